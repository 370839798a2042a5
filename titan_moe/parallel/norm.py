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
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales all gradients so that their global 2-norm is at most `max_norm`.

    Returns the norm before that, (), and the norm of this rank's shard of each parameter's gradient, (P,), 0 for one that
    is not counted here. Each shard counts once: squares are summed over the mesh dimensions that a gradient is sharded
    over, mesh by mesh. pipeline: the ranks that hold other stages' parameters. copies: parameters that another of these
    ranks counts. optimizer: scales the gradients in its own kernel where `scales_gradients` says so.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    gradients: list[Tensor] = []
    not_counted, example = set(copies), parameters[0]
    # On a CPU vector_norm adds the squares in a few long chains, which in float32 costs the sixth digit.
    exact = torch.float64 if example.device.type == "cpu" else accumulation_dtype(example.dtype)
    counted: dict[int, Tensor] = {}
    for number, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        grad = local(parameter.grad)
        gradients.append(grad)
        if parameter not in not_counted:
            by_groups.setdefault(shard_groups(parameter.grad), []).append(number)
            if grad.numel():
                counted[number] = grad
    assert by_groups, "no parameter has a gradient"
    norms = torch.zeros(len(parameters), dtype=exact, device=example.device).unbind()
    found = dict(enumerate(norms)) | dict(zip(counted, foreach_norm(list(counted.values()), exact), strict=True))
    total: Tensor | None = None
    for groups, numbers in by_groups.items():
        part = torch.stack([found[number] for number in numbers]).square().sum()
        for group in groups:
            dist.all_reduce(part, group=group)
        total = part if total is None else total + part
    assert total is not None
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline)
    norm = total.sqrt()
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if optimizer is not None and scales_gradients(optimizer):
        optimizer.grad_scale = factor.to(torch.float32).reciprocal()  # type: ignore[attr-defined] # it divides by this
    else:
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    return norm, torch.stack(list(found.values()))


def foreach_norm(tensors: list[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The 2-norm of each tensor, accumulated in `dtype`: on a GPU a few kernels for all of them. None may be empty."""
    return torch._foreach_norm(tensors, 2, dtype) if tensors else []


def scales_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's update can take the factor of clipping, which saves a pass over all gradients.

    So can PyTorch's fused kernels on a GPU (`grad_scale`, float32; a factor of 1 changes no bit). In float64 its rounding would
    be seen, and on a CPU results stay as they were."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return all(p.is_cuda and p.dtype == torch.float32 for group in optimizer.param_groups for p in group["params"])
