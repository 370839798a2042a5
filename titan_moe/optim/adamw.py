"""AdamW (Loshchilov & Hutter 1711.05101), PyTorch's fused kernel: matrices and routers are decayed, norms and biases not."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from titan_moe.config.extensions import register_optimizer
from titan_moe.config.tables import Optimizer

if TYPE_CHECKING:
    import torch


def adamw(parameters: "Iterable[torch.nn.Parameter]", settings: Optimizer) -> "torch.optim.AdamW":
    import torch

    by_kind: dict[tuple[Any, bool], list[torch.nn.Parameter]] = {}
    for parameter in parameters:  # the fused kernel refuses parameters of different device meshes
        by_kind.setdefault((getattr(parameter, "device_mesh", None), parameter.dim() > 1), []).append(parameter)
    groups = [
        {"params": group, "weight_decay": settings.weight_decay if matrices else 0.0}
        for (_, matrices), group in by_kind.items()
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


register_optimizer("adamw", lambda model, settings: adamw(model.parameters(), settings), lambda *_: 2)
