"""Routed experts in float8: the grouped products forward and for the rows' gradient; the weights' gradient in bfloat16.

Rows of both factors are scaled by powers of two to float8's range (e4m3) and multiplied by PyTorch's scaled grouped GEMM, which
GPUs of compute capability 9.x and 10.x have. The weights' gradient sums over an expert's rows, whose number a float8 product
would need to be a multiple of 16; it stays in bfloat16, as in torchao's recipe `rowwise_with_gw_hp`. On a CPU the same rounding
is multiplied in bfloat16.

R routed rows sorted by expert, D inner width, N outer width, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_moe.model.grouped_gpu import grouped_weight_gradient

FLOAT8 = torch.float8_e4m3fn
GROUPED_UNITS = (9, 10)
"""Major compute capabilities with a scaled grouped GEMM."""


def scaled(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """float8 values, and float32 scales (without `dim`) that are powers of two: x is about values times scales.

    The largest value along `dim` becomes 224 to 448, the largest of the type."""
    largest = x.abs().amax(dim, keepdim=True).float().clamp(min=1e-30)
    exponent = torch.frexp(largest / torch.finfo(FLOAT8).max).exponent
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return (x.float() / scale).to(FLOAT8), scale.squeeze(dim)


def _multiply(
    a_RK: Tensor, a_scale_R: Tensor, b_END: Tensor, b_scale_EN: Tensor, offsets_E: Tensor, fast: bool
) -> Tensor:
    """Row r of a times the transposed b of its expert, (R, K), (E, N, K) -> (R, N) bfloat16. fast: tensor cores may add in
    fewer bits than float32."""
    if a_RK.is_cuda:
        scales = (a_scale_R, b_scale_EN)
        return torch._scaled_grouped_mm(
            a_RK, b_END.transpose(1, 2), *scales, offsets_E, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
    a = (a_RK.float() * a_scale_R.unsqueeze(1)).bfloat16()
    b = (b_END.float() * b_scale_EN.unsqueeze(2)).bfloat16()
    result: Tensor = torch.ops.titan_moe.grouped_linear(a, b, offsets_E)
    return result


class _Float8Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, weight_END, offsets_E)
        return _multiply(*scaled(x_RD, 1), *scaled(weight_END, 2), offsets_E, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RD, weight_END, offsets_E = ctx.saved_tensors
        grad_RN, grad_x, grad_weight = grad_RN.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            transposed_EDN = weight_END.transpose(1, 2).contiguous()
            grad_x = _multiply(*scaled(grad_RN, 1), *scaled(transposed_EDN, 2), offsets_E, fast=False)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_weight_gradient(grad_RN, x_RD, weight_END, offsets_E)
        return grad_x, grad_weight, None


def float8_grouped_linear(x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
    """`grouped_linear` in float8, for bfloat16 rows: (R, D), (E, N, D) -> (R, N). D and N: multiples of 16."""
    result: Tensor = _Float8Grouped.apply(x_RD, weight_END.to(x_RD.dtype), offsets_E)
    return result
