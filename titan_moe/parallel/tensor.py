"""Tensor parallelism: attention heads, hidden units and vocabulary are sharded over ranks that hold the same sequences.

Between layers the hidden states are sharded over the same ranks by tokens (sequence parallelism): `gather_sequence`
collects a sequence's tokens before attention or a feed-forward layer, `reduce_scatter_sequence` sums the partial
products and leaves each rank its own tokens. Inside an MoE layer all ranks route all tokens, with equal results, so
that a loss counts once and not once per rank; `copy_to_tp` and `reduce_from_tp` surround the sharded part.
`reduce_from_tp` also completes inputs of the losses that are sums over hidden units (Gram matrices, squared lengths).
Sources: Shoeybi et al. 1909.08053 (conjugate operations f and g), Korthikanti et al. 2205.05198.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_moe.model.attention import ProjectionNorm, RMSNorm
from titan_moe.model.comm import TPComm
from titan_moe.model.moe import MoELayer
from titan_moe.model.transformer import Block, Transformer
from titan_moe.parallel.norm import sum_gradients
from torchtitan_ext.collectives import Group, all_sum, gather_columns, gathered, reduced


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_sum(grad, ctx.group), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ARG004 - torch's signature
        return all_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 - torch's signature
        return grad, None


class _GatherReplicated(torch.autograd.Function):
    """All-gathers in a dimension. The backward keeps this rank's chunk, because all ranks compute the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()], None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduced(x_BSD, 1, group)

    @staticmethod
    def backward(ctx: Any, grad_BsD: Tensor) -> tuple[Tensor, None]:
        return gathered(grad_BsD, 1, ctx.group), None


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


@torch.compiler.disable
def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


class GroupTPComm(TPComm):
    """Communication over a process group of tensor-parallel ranks."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def copy_to_tp(self, x: Tensor) -> Tensor:
        return _apply(_CopyToTP, x, self.group)

    def reduce_from_tp(self, x: Tensor) -> Tensor:
        return _apply(_ReduceFromTP, x, self.group)

    def gather_sequence(self, x: Tensor) -> Tensor:
        return gather_columns(x, self.group)

    def reduce_scatter_sequence(self, x: Tensor) -> Tensor:
        return _apply(_ReduceScatterSequence, x, self.group)

    def gather_sequence_replicated(self, x: Tensor) -> Tensor:
        return _apply(_GatherReplicated, x, 1, self.group)

    def divide_gradient(self, x: Tensor) -> Tensor:
        return _apply(_DivideGradient, x, self.group.size())

    def gather_from_tp(self, x: Tensor) -> Tensor:
        return _apply(_GatherReplicated, x, x.dim() - 1, self.group)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return all_sum(x, self.group)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        result = x.clone()
        dist.all_reduce(result, dist.ReduceOp.MAX, group=self.group)
        return result

    def shard_offset(self, size: int) -> int:
        return self.group.rank() * size


# The sharded dimension of a weight, by the end of its name; parallelize.shard_experts shards the experts' weights.
SHARD_DIMENSIONS = {
    "embedding": 0,
    "output.weight": 0,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wq.bias": 0,
    "attention.wk.bias": 0,
    "attention.wv.bias": 0,
    "attention.wo.weight": 1,
    ".gate.weight": 0,
    ".up.weight": 0,
    ".down.weight": 1,
}


def shard_dimension(name: str) -> int | None:
    """The dimension that a parameter is sharded in; None for parameters that are replicated (norms of whole tokens or of
    single heads, routers)."""
    return next((dim for end, dim in SHARD_DIMENSIONS.items() if name.endswith(end)), None)


def apply_tensor_parallel(model: Transformer, tp: DeviceMesh) -> None:
    """Shards all weights but the experts' and sets the modules' communication points, in place."""
    comm = GroupTPComm(tp.get_group())
    for name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        dim = 0 if isinstance(owner, ProjectionNorm) else shard_dimension(name)
        if dim is not None:
            sharded = distribute_tensor(parameter.detach(), tp, [Shard(dim)], src_data_rank=None)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(sharded))
    for module in model.modules():
        if isinstance(module, (Transformer, Block, MoELayer, ProjectionNorm)):
            module.comm = comm


def norms(model: Transformer) -> list[nn.Parameter]:
    """Weights whose gradient is a partial sum on every tp rank: norms see only that rank's tokens, or its heads."""
    return [module.weight for module in model.modules() if isinstance(module, RMSNorm)]


@torch.no_grad()
def sum_norm_gradients(model: Transformer, tp: DeviceMesh | None) -> None:
    """Sums the norms' gradients over the tp ranks in one all-reduce."""
    if tp is not None:
        sum_gradients(norms(model), tp.get_group())
