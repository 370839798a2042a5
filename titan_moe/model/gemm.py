"""Matrix products: the dense one, and the grouped one that every expert layer goes through.

`grouped_linear` is the one seam for expert products: replace it to try another kernel. On a GPU it is PyTorch's grouped
GEMM, which is for bfloat16; on a CPU with tiles of bfloat16 (AMX), a C kernel. Otherwise it is one product per expert,
written into place; on a GPU that is slow, because the host has to read the sizes of the products.

R routed rows sorted by expert, D inner width, N outer width, E experts.
"""

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_moe.model.grouped_gpu import grouped_mm
from torchtitan_ext.ops import native


def _cpu_multiplies_bfloat16() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


CPU_MULTIPLIES_BFLOAT16 = _cpu_multiplies_bfloat16()
"""Whether this CPU has bfloat16 units. Without them an x86 CPU is eight times slower in bfloat16 than in float32."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The type to multiply in: bfloat16 values go through float32 units where a CPU has no others (same rounding of inputs
    and results, same float32 accumulation)."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_MULTIPLIES_BFLOAT16:
        return torch.float32
    return x.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in the type of x: (..., D), (N, D) -> (..., N). A float32 master weight is rounded to that type first."""
    dtype = product_dtype(x)
    return F.linear(x.to(dtype), weight.to(x.dtype).to(dtype)).to(x.dtype)


def local(weight: Tensor) -> Tensor:
    """This rank's part of a sharded weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def full(weight: Tensor) -> Tensor:
    """All of a sharded weight, on every rank. Collective."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Linear(nn.Module):
    """A linear map whose weight and bias, if it has one, keep their own type."""

    def __init__(self, inner: int, outer: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outer, inner))
        self.bias = nn.Parameter(torch.empty(outer)) if bias else None
        self.multiply: Callable[[Tensor, Tensor], Tensor] = linear
        """What stands in for the plain product (model/float8.py)."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(x, local(self.weight))
        return out if self.bias is None else out + local(self.bias).to(x.dtype)


def grouped_linear(x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
    """Row r times the transposed weight of its expert: (R, D), (E, N, D) -> (R, N), in the type of x.

    offsets_E: (E,) int32, the end of each expert's rows; an expert may have none. A float32 master weight is rounded to the
    type of x first; on a CPU expert by expert, so that there is no second copy of all weights.
    """
    if x_RD.is_cuda and x_RD.dtype == torch.bfloat16:
        return grouped_mm(x_RD, weight_END.to(x_RD.dtype), offsets_E)
    if type(x_RD) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # For a few tokens at a time, calling an operator costs as much as its work.
        return _products(x_RD, weight_END, offsets_E)
    result: Tensor = torch.ops.titan_moe.grouped_linear(x_RD, weight_END, offsets_E)
    return result


def _in_tiles(x_RD: Tensor, weight_END: Tensor) -> bool:
    """Whether the C kernel multiplies these."""
    types = (torch.bfloat16, torch.float32)
    return x_RD.device.type == "cpu" and x_RD.dtype == types[0] and weight_END.dtype in types and native.tiles()


def _groups(offsets_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    ends = offsets_E.tolist()
    return [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]


def _rounded(rows: int) -> int:
    """The number of rows that a bfloat16 product is computed with: at least `rows`, at most an eighth more or 16.

    oneDNN, which multiplies bfloat16 on a CPU, compiles code for every new size of a product, in 1 to 6 ms. Experts get
    another number of rows in every step, so that compiling would take longer than multiplying. Of rounded numbers there
    are few, and oneDNN keeps the code for 1,024 sizes.
    """
    step = max(16, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // step) * step


def _padded(x_RD: Tensor, start: int, end: int) -> Tensor:
    """Rows from start to end, and rows of zeros up to the rounded number."""
    rows = end - start
    out = x_RD.new_empty(_rounded(rows), x_RD.shape[1])
    out[:rows] = x_RD[start:end]
    out[rows:].zero_()
    return out


def _rows_times(x_RD: Tensor, weight_DN: Tensor, out_RN: Tensor, start: int, end: int) -> None:
    """`out[start:end] = x[start:end] @ weight`. In bfloat16 rows of `out` after `end` may be overwritten: the caller goes
    through the experts in order, so that those are computed later."""
    if x_RD.dtype != torch.bfloat16:
        torch.mm(x_RD[start:end], weight_DN, out=out_RN[start:end])
        return
    after = start + _rounded(end - start)
    if after <= len(x_RD):
        torch.mm(x_RD[start:after], weight_DN, out=out_RN[start:after])
    else:
        out_RN[start:end] = torch.mm(_padded(x_RD, start, end), weight_DN)[: end - start]


def _products(x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
    """`grouped_linear` on a CPU, or by one product per expert."""
    if _in_tiles(x_RD, weight_END):
        return native.grouped(x_RD, weight_END, offsets_E)
    dtype = product_dtype(x_RD)
    out_RN = x_RD.new_empty(x_RD.shape[0], weight_END.shape[1])
    for e, start, end in _groups(offsets_E):
        weight = weight_END[e].to(x_RD.dtype)
        if dtype == x_RD.dtype:
            _rows_times(x_RD, weight.t(), out_RN, start, end)
        else:
            out_RN[start:end] = x_RD[start:end].to(dtype) @ weight.to(dtype).t()
    return out_RN


@torch.library.custom_op("titan_moe::grouped_linear", mutates_args=())
def _grouped_linear(x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
    return _products(x_RD, weight_END, offsets_E)


@_grouped_linear.register_fake
def _(x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:  # noqa: ARG001 - the op's signature
    return x_RD.new_empty(x_RD.shape[0], weight_END.shape[1])


@torch.library.custom_op("titan_moe::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_RN: Tensor, x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    if _in_tiles(x_RD, weight_END):
        grad_x_RD = native.grouped_rows_gradient(grad_RN, weight_END, offsets_E)
        return grad_x_RD, native.grouped_weight_gradient(grad_RN, x_RD, offsets_E, weight_END.dtype)
    dtype = product_dtype(x_RD)
    grad_x_RD = torch.empty_like(x_RD)
    grad_weight_END = torch.empty_like(weight_END)
    groups = _groups(offsets_E)
    for e, start, end in groups:
        grad, x, weight = grad_RN[start:end], x_RD[start:end], weight_END[e].to(x_RD.dtype)
        if dtype == x_RD.dtype:
            _rows_times(grad_RN, weight, grad_x_RD, start, end)
            if dtype == torch.bfloat16:
                grad, x = _padded(grad_RN, start, end), _padded(x_RD, start, end)
        else:
            grad, x = grad.to(dtype), x.to(dtype)
            grad_x_RD[start:end] = grad @ weight.to(dtype)
        if dtype == x_RD.dtype == weight_END.dtype:
            torch.mm(grad.t(), x, out=grad_weight_END[e])
        else:
            grad_weight_END[e] = (grad.t() @ x).to(x_RD.dtype)
    reached = {e for e, _, _ in groups}
    for e in range(weight_END.shape[0]):
        if e not in reached:
            grad_weight_END[e].zero_()
    return grad_x_RD, grad_weight_END


@_grouped_linear_backward.register_fake
def _(grad_RN: Tensor, x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x_RD), torch.empty_like(weight_END)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001 - torch's signature
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_weight = torch.ops.titan_moe.grouped_linear_backward(grad_RN.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_weight, None


_grouped_linear.register_autograd(_backward, setup_context=_save)
