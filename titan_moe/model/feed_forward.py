"""The dense SwiGLU layer: the first dense layers and the shared experts.

T tokens, F hidden width, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.model.gemm import Linear
from torchtitan_ext.dtypes import accumulation_dtype


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
