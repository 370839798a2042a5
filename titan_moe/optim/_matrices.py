"""An optimizer whose rule needs whole matrices: beside AdamW for other parameters, and on sharded parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_moe.model.init import local_part
from torchtitan_ext.collectives import Group, exchange

Rule = Callable[[nn.Parameter, dict[str, Any], dict[str, Any]], None]
"""(parameter, its state, its group): one step of a parameter, in place, on every rank that has a part of it."""


class MatrixOptimizer(torch.optim.Optimizer):
    """AdamW with further groups that follow a rule: one optimizer, so that checkpoints and schedules see one state."""

    def __init__(self, adamw: torch.optim.AdamW, groups: list[dict[str, Any]], rule: Rule) -> None:
        super().__init__([*adamw.param_groups, *groups], {})
        self.adamw, self.adamw_groups, self.rule = adamw, len(adamw.param_groups), rule

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch's signature
        # `load_state_dict` replaces state and groups, so AdamW gets them anew.
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[: self.adamw_groups]
        self.adamw.step()
        for group in self.param_groups[self.adamw_groups :]:
            for parameter in group["params"]:
                self.rule(parameter, self.state[parameter], group)


def on_whole_matrices(x: Tensor, like: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """This rank's part of `function(all of x)`, where x is this rank's part of a tensor that is sharded like `like`.

    function: treats each matrix (the last two dimensions) by itself. A single matrix is gathered and computed by every rank.
    Where ranks hold pieces of several experts, each gets some of the experts whole and sends the pieces of its results back.
    """
    if not isinstance(like, DTensor):
        return function(x)
    mesh, placements = like.device_mesh, like.placements
    if like.dim() > 2:
        # The last mesh dimension first: where two of them shard the same dimension, the first one holds parts of its parts.
        for axis, placement in reversed(list(enumerate(placements))):
            dim = getattr(placement, "dim", 0)
            if dim >= like.dim() - 2:
                function = partial(_exchanged, function, dim, mesh.get_group(axis))
        return function(x)
    parts = DTensor.from_local(x, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    own, corner = local_part(like)
    rows, columns = (slice(first, first + size) for first, size in zip(corner, own.shape, strict=True))
    return function(parts.full_tensor())[rows, columns]


def _exchanged(function: Callable[[Tensor], Tensor], dim: int, group: Group, x: Tensor) -> Tensor:
    """`function` of some of the group's experts with all of `dim`; x has all of them (dimension 0) with a piece of `dim`."""
    ranks, experts = group.size(), x.shape[0]
    sizes = [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]
    own = sizes[group.rank()]
    pieces = exchange(x, sizes, [own] * ranks, group)
    result = function(pieces.unflatten(0, (ranks, own)).movedim(0, dim).flatten(dim, dim + 1))
    pieces = result.unflatten(dim, (ranks, x.shape[dim])).movedim(dim, 0).flatten(0, 1)
    return exchange(pieces, [own] * ranks, sizes, group)
