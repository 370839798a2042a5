"""Keeps a run from going on, again and again, from weights that make a number infinite or NaN.

A checkpoint is written only if all its tensors are finite, and so is a forward pass from them (`check_finite`). It may still
be that no finite step follows, since gradients can overflow. Then it is renamed, and the same command goes on from the one
before (`after_non_finite`).
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.errors import NonFiniteError
from titan_moe.model.gemm import local
from torchtitan_ext.collectives import Group, all_sum

REASON = "no finite step follows from this checkpoint"


def check_finite(step: int, tensors: Mapping[str, Tensor], losses: Mapping[str, float], everyone: Group | None) -> None:
    """Raises NonFiniteError on all ranks if a number of any rank is not finite; a collective.

    tensors: by name, what a checkpoint of `step` would hold; this rank's shards are read, once each. losses: by name, of a
    forward pass after that step, equal on all ranks."""
    bad = next((name for name, x in tensors.items() if not _finite(local(x))), None)
    bad = bad or next((f"{name} of a forward pass" for name, x in losses.items() if not math.isfinite(x)), None)
    device = local(next(iter(tensors.values()))).device
    if all_sum(torch.tensor(float(bad is not None), device=device), everyone) > 0:
        name = bad or "a parameter or optimizer state of another rank"
        raise NonFiniteError(f"step {step}: {name} is not finite after the update; it was not saved", state=step)


def _finite(x: Tensor) -> bool:
    """Whether all numbers are finite, in one pass without a temporary tensor."""
    return x.numel() == 0 or bool(torch.stack(x.aminmax()).isfinite().all())


def after_non_finite(run_dir: RunDir, state: int | None, first: bool) -> str:
    """Which checkpoint a run can go on from, after a number was not finite.

    Renames the newest checkpoint if the number came from its state, unless it is the only one, or a later one was renamed
    for this reason before: going back further would not help. state: the step after which the model was in that state.
    first: only rank 0 renames."""
    steps = run_dir.saved_steps()
    if not steps:
        return "there is no checkpoint yet"
    newest = run_dir.checkpoint(steps[-1])
    if steps[-1] != state:
        return f"the last good checkpoint is {newest}"
    advice = "a smaller optimizer.lr may help, or another --job.name with checkpoint.load_path"
    if len(steps) == 1 or any(step > steps[-1] for step in _renamed(run_dir)):
        why = "it is the only checkpoint" if len(steps) == 1 else "going back to it did not help"
        return f"no finite step follows from {newest}, which stays, since {why}; {advice}"
    kept = run_dir.set_aside(newest, REASON) if first else newest
    return (
        f"no finite step follows from {kept}; the same command goes on from {run_dir.checkpoint(steps[-2])}; {advice}"
    )


def _renamed(run_dir: RunDir) -> list[int]:
    """Steps of the checkpoints that were renamed because no finite step follows from them."""
    found = []
    for path in run_dir.checkpoints.glob("aside-step-*/REASON"):
        name = re.fullmatch(r"aside-step-(\d+)-\d+", path.parent.name)
        if name and path.read_text().startswith(REASON):
            found.append(int(name.group(1)))
    return found
