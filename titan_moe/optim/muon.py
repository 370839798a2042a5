"""Muon: a hidden matrix moves along its momentum with all singular values brought near 1; AdamW updates everything else.

Hidden matrices are those of attention and feed-forward layers, every expert's gate, up and down by itself. The update of one
matrix is `torch.optim.Muon`'s. Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2502.16982 for
"match_rms_adamw"; GLM-5, 2602.15763 ("Muon Split") for heads.
"""

import math
from typing import TYPE_CHECKING, Any, Literal

from titan_moe.config.extensions import register_optimizer
from titan_moe.config.tables import Beta, Optimizer, PositiveInt, Table
from torchtitan_ext.terms import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # Jordan's quintic polynomial
EPS = 1e-7
BY_ADAMW = ("embedding", "output.weight", "router.weight", "shared_gate.weight")
BY_HEAD = ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight")


class Muon(Table):
    """Muon for hidden matrices, with optimizer.weight_decay; embedding, output head, routers and norms by AdamW,
    as are biases and the shared experts' gate."""

    lr: Weight = 0.0
    """Peak learning rate of the hidden matrices; 0: optimizer.lr, which suits adjust_lr "match_rms_adamw"."""
    momentum: Beta = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Nesterov's momentum."""
    ns_steps: PositiveInt = 5
    """Newton-Schulz iterations."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on the learning rate of an (R, C) matrix: 0.2 sqrt(max(R, C)), which gives updates the size of AdamW's, or
    sqrt(max(1, R / C))."""
    split_heads: bool = True
    """Treat every head's rows of wq, wk and wv as a matrix of its own (GLM-5's Muon Split)."""


def is_hidden_matrix(name: str, parameter: "torch.nn.Parameter") -> bool:
    return parameter.dim() > 1 and not name.endswith(BY_ADAMW)


def build(model: Any, settings: Optimizer) -> "torch.optim.Optimizer":
    from titan_moe.optim._matrices import MatrixOptimizer
    from titan_moe.optim.adamw import adamw

    options: Muon = settings.options
    by_rows: dict[int, list[torch.nn.Parameter]] = {}  # rows of a matrix in its parameter; 0: all
    for name, parameter in model.named_parameters():
        if is_hidden_matrix(name, parameter):
            rows = model.settings.head_width if options.split_heads and name.endswith(BY_HEAD) else 0
            by_rows.setdefault(rows, []).append(parameter)
    rest = [parameter for name, parameter in model.named_parameters() if not is_hidden_matrix(name, parameter)]
    common = options.model_dump() | {"lr": options.lr or settings.lr, "weight_decay": settings.weight_decay}
    groups = [{**common, "params": parameters, "rows": rows} for rows, parameters in by_rows.items()]
    return MatrixOptimizer(adamw(rest, settings), groups, update)


def update(parameter: "torch.nn.Parameter", state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of a parameter's matrices: its last two dimensions, cut into `rows` rows each where that is not 0."""
    from titan_moe.model.gemm import local
    from titan_moe.optim._matrices import on_whole_matrices

    assert parameter.grad is not None
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = parameter.grad.clone().zero_()
    gradient, momentum, weight = local(parameter.grad), local(state["momentum_buffer"]), local(parameter)
    momentum.lerp_(gradient, 1 - group["momentum"])
    direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    if direction.dtype.itemsize < 8:  # as in torch, for GPUs' speed; float64 stays so, to compare layouts exactly
        direction = direction.bfloat16()
    rows, columns = group["rows"] or parameter.shape[-2], parameter.shape[-1]

    def by_matrix(x: "Tensor") -> "Tensor":
        return orthogonalize(x.reshape(-1, rows, columns), group["ns_steps"]).reshape(x.shape)

    direction = on_whole_matrices(direction, parameter, by_matrix)
    original = group["adjust_lr"] == "original"
    scale = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * scale)


def orthogonalize(x_NRC: "Tensor", steps: int) -> "Tensor":
    """Matrices with the singular vectors of the given ones and singular values near 1 (0.7 to 1.2), by Newton-Schulz."""
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.mT if tall else x_NRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = x.baddbmm(gram.baddbmm(gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


register_optimizer("muon", build, lambda *named: 1 if is_hidden_matrix(*named) else 2, Muon)
