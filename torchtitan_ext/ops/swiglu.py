"""SwiGLU, the activation of routed experts, alone or in one pass with what sp needs of each token's activations.

R rows, T tokens, K experts per token (k), F hidden width. `select.fused` chooses between the Triton kernels and PyTorch's
operations, which define them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_ext.ops import select

SLICE_ELEMENTS = 1 << 17  # elements per slice, which fit into a CPU core's cache


class _SwiGLU(torch.autograd.Function):
    """Saves only its input for the backward pass, and works in slices so that intermediates stay in the cache."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        if torch.compiler.is_compiling():
            return F.silu(gate) * up
        kernel = select.direct_kernel("swiglu", gate_up)
        if kernel is not None:
            return kernel(gate_up.reshape(-1, gate_up.shape[-1])).view(gate.shape)
        z = gate.new_empty(gate.shape)
        for part, g, u in zip(_slices(z), _slices(gate), _slices(up), strict=True):
            torch.mul(F.silu(g), u, out=part)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        if torch.compiler.is_compiling():
            return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
        kernel = select.direct_kernel("swiglu_backward", gate_up)
        if kernel is not None:
            rows = gate_up.reshape(-1, gate_up.shape[-1]), grad.reshape(-1, grad.shape[-1])
            return kernel(*rows).view(gate_up.shape)
        grad_gate_up = torch.empty_like(gate_up)
        outs = [_slices(part) for part in grad_gate_up.chunk(2, dim=-1)]
        for g, u, d, to_gate, to_up in zip(*map(_slices, (gate, up, grad)), *outs, strict=True):
            torch.mul(d, F.silu(g), out=to_up)
            to_gate.copy_(torch.ops.aten.silu_backward(d * u, g))
        return grad_gate_up


def _slices(x: Tensor) -> tuple[Tensor, ...]:
    rows = x.flatten(0, -2) if x.dim() > 2 else x
    if x.device.type != "cpu":
        return (rows,)  # on a GPU, launching a kernel per slice costs more than the cache saves
    return rows.split(max(1, SLICE_ELEMENTS // max(1, x.shape[-1])))


class _FusedSwiGLU(torch.autograd.Function):
    """The same by one kernel each way, times the rows' gate weights if given."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gates_R: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, gates_R)
        z_RF: Tensor = torch.ops.torchtitan_ext.swiglu(gate_up, gates_R)
        return z_RF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_RF: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, gates_R = ctx.saved_tensors
        d_gate_up, d_gates_R = torch.ops.torchtitan_ext.swiglu_backward(gate_up, dz_RF, gates_R)
        return d_gate_up, None if gates_R is None else d_gates_R


def swiglu(gate_up: Tensor, gates_R: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` of the two halves: (R, 2F) -> (R, F). gates: (R,) float32 to multiply the rows by, only where
    `select.fused(gate_up)`."""
    # Tokens that are generated one by one; in bfloat16 the kernel's rounding counts.
    few = not torch.is_grad_enabled() and gate_up.numel() <= SLICE_ELEMENTS and gate_up.dtype != torch.bfloat16
    if select.transformed(gate_up) or (few and not select.fused(gate_up)):
        assert gates_R is None
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    result: Tensor
    if select.fused(gate_up):
        result = _FusedSwiGLU.apply(gate_up, gates_R)
    else:
        assert gates_R is None
        result = _SwiGLU.apply(gate_up)
    return result


def _backward_alone(
    gate_up: Tensor, rows_TK: Tensor, dz_RF: Tensor, gates_TK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """SwiGLU's gradients where nothing else has one."""
    operators = torch.ops.torchtitan_ext
    if gates_TK is None:
        return operators.swiglu_backward(gate_up, dz_RF, None)[0], None
    gates_R = torch.empty_like(gates_TK).flatten().scatter_(0, rows_TK.flatten(), gates_TK.flatten())
    d_gate_up, d_gates_R = operators.swiglu_backward(gate_up, dz_RF, gates_R)
    return d_gate_up, d_gates_R[rows_TK]


class _SwiGLUCosines(torch.autograd.Function):
    """The backward adds the cosines' gradient to that of z, and forms SwiGLU's derivative, in one pass."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, rows_TK: Tensor, floor: float, gates_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z_RF, values_T, overlaps_T, *saved = torch.ops.torchtitan_ext.swiglu_cosines(gate_up, rows_TK, floor, gates_TK)
        ctx.save_for_backward(gate_up, rows_TK, *saved, gates_TK)
        ctx.mark_non_differentiable(overlaps_T)
        ctx.set_materialize_grads(False)
        return z_RF, values_T, overlaps_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dz_RF: Tensor | None, d_values_T: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, None, None, Tensor | None]:
        gate_up, rows_TK, slopes_TKK, scales_TK, gates_TK = ctx.saved_tensors
        if d_values_T is None:  # sp is only measured
            if dz_RF is None:
                return None, None, None, None
            d_gate_up, d_gates_TK = _backward_alone(gate_up, rows_TK, dz_RF, gates_TK)
            return d_gate_up, None, None, d_gates_TK
        if dz_RF is None:
            dz_RF = _no_gradient(gate_up)
        arguments = (gate_up, rows_TK, dz_RF, slopes_TKK, scales_TK, d_values_T, gates_TK)
        d_gate_up, d_gates_TK = torch.ops.torchtitan_ext.swiglu_cosines_backward(*arguments)
        return d_gate_up, None, None, None if gates_TK is None else d_gates_TK


def _no_gradient(gate_up: Tensor) -> Tensor:
    return gate_up.new_zeros(gate_up.shape[0], gate_up.shape[1] // 2)


def swiglu_cosines(
    gate_up: Tensor, rows_TK: Tensor, floor: float, gates_TK: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """SwiGLU and its tokens' squared cosines, where `select.fused(gate_up)`: z (R, F), values (T,), overlaps (T,).

    values: `squared_cosines(token_gram(z, rows, scaled=True), floor)`; overlaps: the same with floor 0, without a gradient.
    gate_up: (R, 2F). rows: (T, k) int64; every row must belong to one token. gates: (T, k) float32 that z is multiplied by;
    the cosines are those of z before. First derivatives only."""
    result: tuple[Tensor, Tensor, Tensor] = _SwiGLUCosines.apply(gate_up, rows_TK, floor, gates_TK)
    return result


class _SwiGLUGram(torch.autograd.Function):
    """The same with the Gram matrices, whose gradient may be any."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, rows_TK: Tensor, gates_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        z_RF, gram_TKK = torch.ops.torchtitan_ext.swiglu_gram(gate_up, rows_TK, gates_TK)
        ctx.save_for_backward(gate_up, rows_TK, gates_TK)
        ctx.set_materialize_grads(False)
        return z_RF, gram_TKK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_RF: Tensor | None, grad_TKK: Tensor | None) -> tuple[Tensor | None, None, Tensor | None]:
        gate_up, rows_TK, gates_TK = ctx.saved_tensors
        if grad_TKK is None:
            if dz_RF is None:
                return None, None, None
            d_gate_up, d_gates_TK = _backward_alone(gate_up, rows_TK, dz_RF, gates_TK)
            return d_gate_up, None, d_gates_TK
        if dz_RF is None:
            dz_RF = _no_gradient(gate_up)
        arguments = (gate_up, rows_TK, dz_RF, grad_TKK + grad_TKK.transpose(1, 2), gates_TK)
        d_gate_up, d_gates_TK = torch.ops.torchtitan_ext.swiglu_gram_backward(*arguments)
        return d_gate_up, None, None if gates_TK is None else d_gates_TK


def swiglu_gram(gate_up: Tensor, rows_TK: Tensor, gates_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """SwiGLU and `token_gram(z, rows)`, where `select.fused(gate_up)`: z (R, F), Gram matrices (T, k, k).

    For tensor parallelism, which sums Gram matrices over hidden units. Arguments and limits as in `swiglu_cosines`."""
    result: tuple[Tensor, Tensor] = _SwiGLUGram.apply(gate_up, rows_TK, gates_TK)
    return result
