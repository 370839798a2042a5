"""Sums and norms of gradients of parameters that are sharded over different meshes."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan_ext.dtypes import accumulation_dtype


def shard_groups(x: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of ranks that hold parts of a tensor, one per dimension of its mesh that it is sharded over."""
    if not isinstance(x, DTensor):
        return ()
    dims = [d for d, placement in enumerate(x.placements) if not placement.is_replicate()]
    return tuple(x.device_mesh.get_group(d) for d in dims)


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Over a group's ranks, this rank's parts of them, in one go."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


@torch.no_grad()
def clip_gradients(
    parameters: Sequence[nn.Parameter], highest: float, stages: dist.ProcessGroup | None = None
) -> Tensor:
    """Scales all gradients so that their total 2-norm is at most `highest`; returns the norm before that, the same on every
    rank. Each shard is counted once: sums run over the mesh dimensions that a gradient is sharded over, one pass per mesh.
    stages: ranks with other parameters (a pipeline's)."""
    squares: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    locals_: list[Tensor] = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        groups = shard_groups(grad)
        if isinstance(grad, DTensor):
            grad = grad.to_local()
        locals_.append(grad)
        squares.setdefault(groups, []).append(grad)
    total: Tensor | None = None
    for groups, grads in squares.items():
        # A CPU adds a norm's squares up in a few long chains: in float32 that costs the sixth digit.
        exact = torch.float64 if grads[0].device.type == "cpu" else accumulation_dtype(grads[0].dtype)
        part = torch.stack([torch.linalg.vector_norm(grad, dtype=exact) for grad in grads]).square().sum()
        for group in groups:
            dist.all_reduce(part, group=group)
        total = part if total is None else total + part
    assert total is not None, "no parameter has a gradient"
    if stages is not None:
        dist.all_reduce(total, group=stages)
    norm = total.sqrt()
    factor = torch.clamp(highest / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(locals_, factor.to(locals_[0].dtype))
    return norm
