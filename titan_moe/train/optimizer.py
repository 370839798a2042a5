"""AdamW with weight decay on matrices only, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from titan_moe.config.tables import LRScheduler, Optimizer


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW, one kernel for all parameters of a mesh. Norms are not decayed; the router's matrix is, its balancing bias is no
    parameter."""
    by_kind: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():  # one kernel can't take parameters of different meshes
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        by_kind.setdefault((mesh, parameter.dim() > 1), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": settings.weight_decay if matrices else 0.0}
        for (_, matrices), parameters in by_kind.items()
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


def lr_fraction(step: int, steps: int, schedule: LRScheduler) -> float:
    """Learning rate of a step (1 is the first) as a share of the peak."""
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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
