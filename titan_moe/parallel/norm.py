"""Sums and norms of gradients whose parameters are sharded over different meshes."""

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_moe.model.gemm import local
from torchtitan_ext.dtypes import accumulation_dtype


def shard_groups(x: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process group of every mesh dimension that a tensor is sharded over."""
    if not isinstance(x, DTensor):
        return ()
    dims = [d for d, placement in enumerate(x.placements) if not placement.is_replicate()]
    return tuple(x.device_mesh.get_group(d) for d in dims)


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums the parameters' gradients (this rank's shards) over a process group in one all-reduce, in place."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


@torch.no_grad()
def clip_gradients(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    pipeline: dist.ProcessGroup | None = None,
    copies: Collection[nn.Parameter] = (),
) -> tuple[Tensor, Tensor]:
    """Scales all gradients so that their global 2-norm is at most `max_norm`.

    Returns the norm before that, (), and the norm of this rank's shard of each parameter's gradient, (P,), 0 for one that
    is not counted here. Each shard counts once: squares are summed over the mesh dimensions that a gradient is sharded
    over, mesh by mesh. pipeline: the ranks that hold other stages' parameters. copies: parameters that another of these
    ranks counts.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    gradients: list[Tensor] = []
    not_counted, example = set(copies), parameters[0]
    # On a CPU vector_norm adds the squares in a few long chains, which in float32 costs the sixth digit.
    exact = torch.float64 if example.device.type == "cpu" else accumulation_dtype(example.dtype)
    norms = [torch.zeros((), dtype=exact, device=example.device)] * len(parameters)
    for number, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        grad = local(parameter.grad)
        gradients.append(grad)
        if parameter not in not_counted:
            norms[number] = torch.linalg.vector_norm(grad, dtype=exact)
            by_groups.setdefault(shard_groups(parameter.grad), []).append(number)
    total: Tensor | None = None
    for groups, numbers in by_groups.items():
        part = torch.stack([norms[number] for number in numbers]).square().sum()
        for group in groups:
            dist.all_reduce(part, group=group)
        total = part if total is None else total + part
    assert total is not None, "no parameter has a gradient"
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline)
    norm = total.sqrt()
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    return norm, torch.stack(norms)
