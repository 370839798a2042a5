"""The collectives that losses and experts need. Group None means a single process.

The objective is a sum over ranks, J = sum_r J_r. So the backward of a collective sums gradients over ranks; it never
averages them.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

Group = dist.ProcessGroup
# Names in torch.distributed: those of torch 2.13 and newer, else those before.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


class Ranks(NamedTuple):
    """The process groups over which the tokens of one microbatch are split."""

    data: Group | None = None
    """All ranks with tokens of the same micro-step, whole sequences or parts of them."""
    sequence: Group | None = None
    """The ranks with parts of the same sequences (context parallelism)."""


def all_sum(x: Tensor, group: Group | None) -> Tensor:
    """The sum over ranks, without a gradient."""
    x = x.detach()
    if group is not None:
        x = torch.ops.torchtitan_ext.all_sum(x, group.group_name)
    return x


@torch.library.custom_op("torchtitan_ext::all_sum", mutates_args=())
def _all_sum(x: Tensor, group_name: str) -> Tensor:
    """A custom operator, so that torch.compile does not break the graph here."""
    total = x.contiguous().clone()
    dist.all_reduce(total, group=_resolve_process_group(group_name))  # type: ignore[arg-type] # a NewType of str
    return total


@_all_sum.register_fake
def _(x: Tensor, group_name: str) -> Tensor:  # noqa: ARG001 - the op's signature
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gathered(x: Tensor, dim: int, group: Group) -> Tensor:
    """Every rank's x concatenated along `dim`, in the order of ranks, without a gradient."""
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    getattr(dist, ALL_GATHER)(parts, x.contiguous(), group=group)
    return parts if dim == 0 else torch.cat(parts.chunk(group.size()), dim)


def reduced(x: Tensor, dim: int, group: Group) -> Tensor:
    """Reduce-scatter: this rank's chunk along `dim` of the sum over ranks, without a gradient."""
    parts = torch.cat(x.chunk(group.size(), dim))
    mine = parts.new_empty(parts.shape[0] // group.size(), *parts.shape[1:])
    getattr(dist, REDUCE_SCATTER)(mine, parts, group=group)
    return mine


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = (send, receive), group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.sizes
        return _all_to_all(grad, receive, send, ctx.group), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    out: Tensor = torch.ops.torchtitan_ext.all_to_all(x, send, receive, group.group_name)
    return out


@torch.library.custom_op("torchtitan_ext::all_to_all", mutates_args=())
def _all_to_all_op(x: Tensor, send: list[int], receive: list[int], group_name: str) -> Tensor:
    """A custom operator, so that selective recomputation can keep what it returns and need not send it again."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    group = _resolve_process_group(group_name)  # type: ignore[arg-type] # a NewType of str
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


@_all_to_all_op.register_fake
def _(x: Tensor, send: list[int], receive: list[int], group_name: str) -> Tensor:  # noqa: ARG001 - the op's signature
    return x.new_empty(sum(receive), *x.shape[1:])


@torch.compiler.disable
def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Differentiable all-to-all: the first send[0] rows of x go to rank 0 and so on; receive[r] come from rank r."""
    result: Tensor = _Exchange.apply(x, send, receive, group)
    return result


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gathered(x, 1, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduced(grad, 1, ctx.group), None


@torch.compiler.disable
def gather_columns(x: Tensor, group: Group) -> Tensor:
    """Differentiable all-gather along dimension 1, (N, M, ...) -> (N, ranks * M, ...); backward: reduce-scatter."""
    result: Tensor = _GatherColumns.apply(x, group)
    return result
