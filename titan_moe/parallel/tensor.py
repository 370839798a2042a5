"""Tensor parallelism: attention heads, hidden units and vocabulary are spread over ranks that hold the same sequences.

The residual stream and its norms are spread over the same ranks by tokens (sequence parallelism): `gather` brings the
tokens of a sequence together before attention or a feed-forward layer, `scatter` adds up the partial products and leaves each
rank its own tokens. Inside an MoE layer every rank routes all tokens alike, so a loss counts once, not once per rank; there
two other conjugate operations mark the borders: `enter` is the identity and sums gradients, `leave` sums values and is the
identity for gradients. The losses' inputs that are sums over hidden units (Gram matrices, lengths) leave like any other
partial sum.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_moe.model.attention import RMSNorm
from titan_moe.model.moe import MoELayer
from titan_moe.model.shares import Shares
from titan_moe.model.transformer import Block, Transformer
from titan_moe.parallel.norm import sum_gradients
from torchtitan_ext.collectives import Group, all_sum, gather_columns, gathered, reduced


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


class _Whole(torch.autograd.Function):
    """All ranks' parts in a dimension. The backward takes this rank's part of what every rank computed alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()], None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduced(x_BSD, 1, group)

    @staticmethod
    def backward(ctx: Any, grad_BsD: Tensor) -> tuple[Tensor, None]:
        return gathered(grad_BsD, 1, ctx.group), None


class _Alike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


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

    def gather(self, x: Tensor) -> Tensor:
        return gather_columns(x, self.group)

    @torch.compiler.disable
    def scatter(self, x: Tensor) -> Tensor:
        result: Tensor = _Scatter.apply(x, self.group)
        return result

    @torch.compiler.disable
    def whole(self, x: Tensor) -> Tensor:
        result: Tensor = _Whole.apply(x, 1, self.group)
        return result

    @torch.compiler.disable
    def alike(self, x: Tensor) -> Tensor:
        result: Tensor = _Alike.apply(x, self.group.size())  # `gather` adds up what the ranks' gradients are
        return result

    @torch.compiler.disable
    def widen(self, x: Tensor) -> Tensor:
        result: Tensor = _Whole.apply(x, x.dim() - 1, self.group)
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
        if isinstance(module, (Transformer, Block, MoELayer)):
            module.shares = shares


def norms(model: Transformer) -> list[nn.Parameter]:
    """The weights of which every rank's gradient is a share: norms see this rank's tokens, or its heads."""
    return [module.weight for module in model.modules() if isinstance(module, RMSNorm)]


@torch.no_grad()
def sum_norm_gradients(model: Transformer, tp: DeviceMesh | None) -> None:
    """Over the ranks of tp, in one go."""
    if tp is not None:
        sum_gradients(norms(model), tp.get_group())
