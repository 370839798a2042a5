"""Chooses the checkpoint to resume from: the newest one whose files agree with its manifest."""

import logging
from pathlib import Path

import torch.distributed as dist

from titan_moe.checkpoint.manifest import DamageError, UnreadableError, read_manifest, verify
from titan_moe.checkpoint.run_dir import RunDir, all_steps
from titan_moe.checkpoint.state import FORMAT_VERSION, format_version
from titan_moe.errors import UserError
from titan_moe.parallel.mesh import Mesh, from_first

log = logging.getLogger("titan_moe")


def newest_good(run_dir: RunDir, mesh: Mesh, start_over: bool = False) -> Path | None:
    """The newest undamaged checkpoint; a collective, which renames damaged ones to aside-*. None: the run starts at step 0.

    Raises UserError when a checkpoint has another format version or can't be read now, and when none is left of those that
    the run had saved, unless `start_over`."""
    steps = from_first(lambda: all_steps(run_dir.checkpoints))
    for step in reversed(steps):
        path = run_dir.checkpoint(step)
        problem = damage(path, mesh)
        if problem is None:
            return path
        if mesh.first:
            aside = run_dir.set_aside(path, problem)
            log.warning(f"{path} is damaged: {problem}; kept as {aside.name}, trying the checkpoint before it")
    lost = from_first(run_dir.lost_steps)
    if (steps or lost) and not start_over:
        what = f"it has made {lost:,} steps" if lost else "it had checkpoints"
        raise UserError(
            f"{run_dir.path} has no usable checkpoint, but {what}; bring a checkpoint back, choose another --job.name, or "
            "start again from step 0 with --checkpoint.start_over=true (its metrics are kept aside)"
        )
    return None


def damage(path: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint, or None; a collective. Raises UserError for another format version, and where a rank
    can't read it now."""
    world = mesh.degrees.world
    problem, unreadable = None, None
    try:
        verify(path, read_manifest(path), mesh.rank, world)
    except UnreadableError as error:
        unreadable = str(error)
    except DamageError as error:
        version = format_version(path)
        if version not in (None, FORMAT_VERSION):
            unreadable = (
                f"{path} has format version {version}; this program reads {FORMAT_VERSION}. Resume with the program that "
                "wrote it, or choose another --job.name"
            )
        problem = str(error)
    problems = [(problem, unreadable)]
    if world > 1:
        problems *= world
        dist.all_gather_object(problems, (problem, unreadable))
    reason = next((text for _, text in problems if text is not None), None)
    if reason is not None:
        raise UserError(reason)
    return next((text for text, _ in problems if text is not None), None)
