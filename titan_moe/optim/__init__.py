"""Optimizers by name, and the learning rate as a pure function of the step.

Every file of this folder registers an optimizer, as a user's own module would (docs/extending.md). Configuration and `--help`
import these files for their options, so they import torch inside functions; `_matrices.py`, with an underscore, is exempt.
"""

import math
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from titan_moe.config.extensions import optimizers
from titan_moe.config.tables import LRScheduler, Optimizer

if TYPE_CHECKING:
    import torch


def build_optimizer(model: "torch.nn.Module", settings: Optimizer) -> "torch.optim.Optimizer":
    """The optimizer `settings.name` of this rank's parameters. Each group's `lr` becomes its peak, `peak_lr`."""
    optimizer: torch.optim.Optimizer = optimizers[settings.name].build(model, settings)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def lr_fraction(step: int, steps: int, schedule: LRScheduler) -> float:
    """Learning rate of a step (1 is the first) as a fraction of the peak."""
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    lowest = schedule.min_lr_fraction
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    if schedule.decay == "cosine":
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if schedule.decay == "linear":
        return lowest + (1 - lowest) * (1 - min(progress, 1.0))
    if schedule.decay == "wsd":
        length = schedule.decay_fraction * steps
        return 1.0 if length == 0 else lowest + (1 - lowest) * min(1.0, max(0.0, (steps - step) / length))
    return 1.0


def set_lr(optimizer: "torch.optim.Optimizer", fraction: float) -> None:
    """Sets every group's learning rate to this fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * fraction


for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")
