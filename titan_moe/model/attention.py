"""Grouped-query attention with rotary positions, through scaled_dot_product_attention.

B sequences, S tokens, H query heads, G key-value heads, d head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.config.tables import Model
from titan_moe.model.gemm import Linear, product_dtype
from torchtitan_ext.dtypes import accumulation_dtype


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in at least float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        weight = self.weight.to(x.dtype).to(dtype)  # rounded as in FSDP's mixed precision, for equal results
        return F.rms_norm(x.to(dtype), weight.shape, weight, self.eps).to(x.dtype)


def rotary_tables(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (B, S, 1, d/2). Source: RoFormer, Eq. 34, with halves for pairs."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_BS.device) / head_dim
    angles = positions_BS.to(torch.float64).unsqueeze(-1) * theta**-exponent
    return angles.cos().to(dtype).unsqueeze(2), angles.sin().to(dtype).unsqueeze(2)


def rotate(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_j, x_{j + d/2}) by their angle."""
    first, second = x_BSHd.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHd.dtype)


class Attention(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.heads = model.heads
        self.kv_heads = model.kv_heads or model.heads
        self.head_dim = model.head_width
        self.wq = Linear(model.dim, self.heads * self.head_dim)
        self.wk = Linear(model.dim, self.kv_heads * self.head_dim)
        self.wv = Linear(model.dim, self.kv_heads * self.head_dim)
        self.wo = Linear(self.heads * self.head_dim, model.dim)
        self.q_norm = RMSNorm(self.head_dim, model.norm_eps) if model.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, model.norm_eps) if model.qk_norm else None
        self.gather: Callable[[Tensor], Tensor] | None = None
        """From keys and values of these tokens (B, S, 2 * H * d) to those of all tokens that they may attend to: all-gathers
        over ranks (parallel/context.py), or appends to a cache (generate/cache.py). None: these are all tokens."""
        self.gathered_width = 2 * self.kv_heads * self.head_dim
        """Numbers per token that `gather` exchanges, over all tensor-parallel ranks."""

    def score_flops(self, seq_len: int) -> int:
        """FLOPs per token of scores and weighted values, forward and backward; the causal mean context is seq_len / 2."""
        return 6 * seq_len * self.heads * self.head_dim

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask_BSS: Tensor | None) -> Tensor:
        """(B, S, D) -> (B, S, D). mask_BSS: which (query, key) pairs may attend; None: causal."""
        batch, seq, _ = x_BSD.shape
        q, k, v = (w(x_BSD).view(batch, seq, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.gather is not None:
            kv = self.gather(torch.cat([k, v], dim=2).flatten(2))
            k, v = kv.view(batch, kv.shape[1], -1, self.head_dim).chunk(2, dim=2)
        dtype = product_dtype(q)
        out_BHSd = F.scaled_dot_product_attention(
            q.transpose(1, 2).to(dtype),
            k.transpose(1, 2).to(dtype),
            v.transpose(1, 2).to(dtype),
            attn_mask=None if mask_BSS is None else mask_BSS.unsqueeze(1),
            is_causal=mask_BSS is None,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.wo(out_BHSd.transpose(1, 2).reshape(batch, seq, -1).to(x_BSD.dtype))
