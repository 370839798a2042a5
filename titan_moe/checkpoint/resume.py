"""Which checkpoint a run goes on from: the newest one whose every byte is what was written."""

import logging
from pathlib import Path

import torch.distributed as dist

from titan_moe.checkpoint.manifest import DamageError, read_manifest, verify
from titan_moe.checkpoint.run_dir import FORMAT_VERSION, RunDir, all_steps, format_version
from titan_moe.errors import UserError
from titan_moe.parallel.mesh import Mesh, from_first

log = logging.getLogger("titan_moe")


def newest_good(run_dir: RunDir, mesh: Mesh) -> Path | None:
    """The newest undamaged checkpoint; newer ones that are damaged are set aside. The same on every rank, each of which reads
    a part of the files. Raises UserError for one of another format version: that is no damage."""
    steps = from_first(lambda: all_steps(run_dir.checkpoints))
    for step in reversed(steps):
        path = run_dir.checkpoint(step)
        problem = damage(path, mesh)
        if problem is None:
            return path
        if mesh.first:
            aside = run_dir.set_aside(path, problem)
            log.warning(f"{path} is damaged: {problem}; kept as {aside.name}, going back to the one before")
    return None


def damage(path: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint, as any rank found."""
    world = mesh.degrees.world
    problem = None
    try:
        verify(path, read_manifest(path), mesh.rank, world)
    except DamageError as error:
        version = format_version(path)
        if version not in (None, FORMAT_VERSION):
            raise UserError(
                f"{path} has format version {version}; this program reads {FORMAT_VERSION}. Go on with the program that "
                "wrote it, or choose another --job.name"
            ) from error
        problem = str(error)
    if world == 1:
        return problem
    found: list[str | None] = [None] * world
    dist.all_gather_object(found, problem)
    return next((text for text in found if text is not None), None)
