"""Chooses the checkpoint to resume from: the newest one whose files agree with its manifest."""

import logging
from pathlib import Path

import torch.distributed as dist

from titan_moe.checkpoint.manifest import DamageError, read_manifest, verify
from titan_moe.checkpoint.run_dir import FORMAT_VERSION, RunDir, all_steps, format_version
from titan_moe.errors import UserError
from titan_moe.parallel.mesh import Mesh, from_first

log = logging.getLogger("titan_moe")


def newest_good(run_dir: RunDir, mesh: Mesh) -> Path | None:
    """The newest undamaged checkpoint, or None; a collective, which renames damaged ones to aside-*. Raises UserError
    when the newest has another format version."""
    steps = from_first(lambda: all_steps(run_dir.checkpoints))
    for step in reversed(steps):
        path = run_dir.checkpoint(step)
        problem = damage(path, mesh)
        if problem is None:
            return path
        if mesh.first:
            aside = run_dir.set_aside(path, problem)
            log.warning(f"{path} is damaged: {problem}; kept as {aside.name}, trying the checkpoint before it")
    return None


def damage(path: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint, or None; a collective. Raises UserError for another format version."""
    world = mesh.degrees.world
    problem = None
    try:
        verify(path, read_manifest(path), mesh.rank, world)
    except DamageError as error:
        version = format_version(path)
        if version not in (None, FORMAT_VERSION):
            raise UserError(
                f"{path} has format version {version}; this program reads {FORMAT_VERSION}. Resume with the program that "
                "wrote it, or choose another --job.name"
            ) from error
        problem = str(error)
    if world == 1:
        return problem
    problems: list[str | None] = [None] * world
    dist.all_gather_object(problems, problem)
    return next((text for text in problems if text is not None), None)
