"""SwiGLU, the activation of dense layers, shared experts and routed experts, and the dense feed-forward layer.

R rows, T tokens, F hidden width, D model width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.model.gemm import Linear
from torchtitan_ext.dtypes import accumulation_dtype

SLICE_ELEMENTS = 1 << 17  # elements per slice, which fit into a CPU core's cache


class _SwiGLU(torch.autograd.Function):
    """Saves only its input for the backward pass, and works in slices so that intermediates stay in the cache."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        if torch.compiler.is_compiling():
            return F.silu(gate) * up
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


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves: (R, 2F) -> (R, F)."""
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


class FeedForward(nn.Module):
    """A dense SwiGLU layer: the shared experts, and the first dense layers."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden_dim)
        self.up = Linear(dim, hidden_dim)
        self.down = Linear(hidden_dim, dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TD: Tensor = self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))
        return out_TD


class SharedGate(nn.Module):
    """A factor on each token's shared experts: the sigmoid of a linear map of x, in at least float32 (Qwen2-MoE)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, 1)."""
        dtype = accumulation_dtype(x_TD.dtype)
        weight = self.weight.to(x_TD.dtype).to(dtype)  # rounded as in FSDP's mixed precision, for equal results
        return F.linear(x_TD.to(dtype), weight).sigmoid()
