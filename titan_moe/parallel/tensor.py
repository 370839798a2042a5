"""Tensor parallelism: attention heads, hidden units and vocabulary are spread over ranks that hold the same tokens.

Every rank computes what stands between two products redundantly and alike, so a loss counts once, not once per rank. Two
conjugate operations mark the borders: `enter` is the identity and sums gradients, `leave` sums values and is the identity for
gradients. The losses' inputs that are sums over hidden units (Gram matrices, lengths) leave like any other partial sum.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_moe.model.attention import Attention
from titan_moe.model.feed_forward import FeedForward
from titan_moe.model.moe import MoELayer
from titan_moe.model.shares import Shares
from titan_moe.model.transformer import Transformer
from torchtitan_ext.collectives import Group, all_sum


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_sum(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ARG004 - torch's signature
        return all_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 - torch's signature
        return grad, None


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.group.rank() * ctx.width, ctx.width), None


class TensorShares(Shares):
    """This rank's share of heads, hidden units and vocabulary."""

    def __init__(self, group: Group) -> None:
        self.group = group

    @torch.compiler.disable
    def enter(self, x: Tensor) -> Tensor:
        result: Tensor = _Enter.apply(x, self.group)
        return result

    @torch.compiler.disable
    def leave(self, x: Tensor) -> Tensor:
        result: Tensor = _Leave.apply(x, self.group)
        return result

    @torch.compiler.disable
    def widen(self, x: Tensor) -> Tensor:
        result: Tensor = _Widen.apply(x, self.group)
        return result

    def total(self, x: Tensor) -> Tensor:
        return all_sum(x, self.group)

    def highest(self, x: Tensor) -> Tensor:
        found = x.clone()
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found

    def first_row(self, rows: int) -> int:
        return self.group.rank() * rows


# Which dimension of a weight is spread, by the end of its name; experts' weights are parallelize.spread_experts's.
DIMENSIONS = {
    "embedding": 0,
    "output.weight": 0,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "gate.weight": 0,
    "up.weight": 0,
    "down.weight": 1,
}


def spread_dimension(name: str) -> int | None:
    """The dimension in which a parameter is spread; None for what every rank holds whole (norms, routers)."""
    return next((dim for end, dim in DIMENSIONS.items() if name.endswith(end)), None)


def spread_tensors(model: Transformer, tp: DeviceMesh) -> None:
    """Gives every rank its part of the weights that are not the experts', and tells the modules."""
    shares = TensorShares(tp.get_group())
    for name, parameter in list(model.named_parameters()):
        dim = spread_dimension(name)
        if dim is not None:
            own = distribute_tensor(parameter.detach(), tp, [Shard(dim)], src_data_rank=None)
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(own))
    for module in model.modules():
        if isinstance(module, (Transformer, Attention, FeedForward, MoELayer)):
            module.shares = shares
