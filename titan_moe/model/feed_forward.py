"""The dense SwiGLU layer: the first dense layers and the shared experts.

T tokens, F hidden width, D model width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.model.gemm import Linear


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
