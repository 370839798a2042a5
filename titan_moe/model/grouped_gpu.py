"""PyTorch's grouped GEMM on an NVIDIA GPU, with what single generations of GPUs need around it.

R routed rows sorted by expert, D inner width, N outer width, E experts.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _major(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0] if torch.cuda.is_available() else 0


@torch.compiler.assume_constant_result
def garbage_of_empty_groups(index: int | None) -> bool:
    """Whether this GPU may leave the weight gradient of an expert without rows unwritten: it then holds what was in memory,
    which may be NaN. PyTorch's users report it of B200 and B300, compute capability 10.x."""
    return _major(index) == 10


class _ZeroEmpty(torch.autograd.Function):
    """The identity on expert weights; the backward writes zeros for experts without rows."""

    @staticmethod
    def forward(ctx: Any, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(offsets_E)
        return weight_END.view_as(weight_END)

    @staticmethod
    def backward(ctx: Any, grad_END: Tensor) -> tuple[Tensor, None]:
        (offsets_E,) = ctx.saved_tensors
        return _zeroed(grad_END, offsets_E), None


def _zeroed(grad_END: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient with zeros for experts without rows."""
    empty_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) == 0
    return grad_END.masked_fill(empty_E.view(-1, 1, 1), 0.0)  # not a product: NaN times 0 is NaN


def zero_empty(weight_END: Tensor, offsets_E: Tensor) -> Tensor:
    """The weights, with a gradient of 0 for experts without rows. offsets_E: end of each expert's rows, int32."""
    result: Tensor = _ZeroEmpty.apply(weight_END, offsets_E)
    return result


def grouped_mm(x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
    """Row r times the transposed weight of its expert, in bfloat16: (R, D), (E, N, D) -> (R, N)."""
    if garbage_of_empty_groups(x_RD.device.index):
        weight_END = zero_empty(weight_END, offsets_E)
    return F.grouped_mm(x_RD, weight_END.transpose(1, 2), offs=offsets_E)


def grouped_weight_gradient(grad_RN: Tensor, x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
    """The weights' gradient of `grouped_linear` alone, in the type of x: (E, N, D); on a CPU too, where it is slower."""
    if not x_RD.is_cuda:
        gradient: Tensor = torch.ops.titan_moe.grouped_linear_backward(grad_RN, x_RD, weight_END, offsets_E)[1]
        return gradient
    gradient = F.grouped_mm(grad_RN.t(), x_RD, offs=offsets_E)
    return _zeroed(gradient, offsets_E) if garbage_of_empty_groups(x_RD.device.index) else gradient
