"""Grouped-query attention with rotary positions, through scaled_dot_product_attention.

B sequences, S tokens, H query heads, G key-value heads, d head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_moe.config.tables import Model
from titan_moe.model.comm import SINGLE_RANK, TPComm
from titan_moe.model.gemm import Linear, local, product_dtype
from titan_moe.model.masks import Mask, attend
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops import select


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in at least float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        weight = self.weight.to(x.dtype)  # rounded as in FSDP's mixed precision, for equal results
        if x.is_cuda and dtype == torch.float32:  # one kernel, which computes in float32 and rounds its result
            return F.rms_norm(x, weight.shape, weight, self.eps)
        weight = weight.to(dtype)
        return F.rms_norm(x.to(dtype), weight.shape, weight, self.eps).to(x.dtype)


class ProjectionNorm(nn.Module):
    """RMSNorm over all heads' queries or keys together (OLMoE, Muennighoff et al. 2409.02060), in at least float32.

    Under tensor parallelism a rank has some of the heads and their weights; squared lengths are summed over the ranks.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.comm: TPComm = SINGLE_RANK
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_BSN: Tensor) -> Tensor:
        """N: this rank's part of the `width` elements."""
        dtype = accumulation_dtype(x_BSN.dtype)
        x, weight = x_BSN.to(dtype), local(self.weight).to(x_BSN.dtype).to(dtype)  # rounded as in RMSNorm
        # Every rank's elements depend on the sum, so its gradient is summed over the ranks too.
        squares = self.comm.copy_to_tp(self.comm.reduce_from_tp(x.square().sum(-1, keepdim=True)))
        return (x * torch.rsqrt(squares / self.width + self.eps) * weight).to(x_BSN.dtype)


def qk_norm(model: Model, heads: int) -> RMSNorm | ProjectionNorm | None:
    """The norm of the queries or keys of so many heads, if the model has one."""
    if model.qk_norm == "projection":
        return ProjectionNorm(heads * model.head_width, model.norm_eps)
    return RMSNorm(model.head_width, model.norm_eps) if model.qk_norm else None


def rotary_tables(positions_BS: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (B, S, 1, width / 2). width: elements of a head that are turned.

    Source: RoFormer, Eq. 34, with halves for pairs."""
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions_BS.device) / width
    angles = positions_BS.to(torch.float64).unsqueeze(-1) * theta**-exponent
    return angles.cos().to(dtype).unsqueeze(2), angles.sin().to(dtype).unsqueeze(2)


class _Rotate(torch.autograd.Function):
    """`rotate` by a kernel. A rotation's gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BSHd, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHd: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_BSHd, cos, sin, back=True), None, None


def _turned(x_BSHd: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    tables = (table.expand(*x_BSHd.shape[:2], 1, -1).flatten(0, 2) for table in (cos, sin))
    return torch.ops.torchtitan_ext.rotate(x_BSHd.flatten(0, 1), *tables, back).view_as(x_BSHd)


def rotate(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_j, x_{j + w/2}) of the first w elements by their angle, where the tables have w/2 columns."""
    # A compiler makes one kernel of the operations below and of their neighbours.
    if select.fused(x_BSHd) and not torch.compiler.is_compiling():
        turned: Tensor = _Rotate.apply(x_BSHd, cos, sin)
        return turned
    width = 2 * cos.shape[-1]
    if width < x_BSHd.shape[-1]:
        return torch.cat([rotate(x_BSHd[..., :width], cos, sin), x_BSHd[..., width:]], dim=-1)
    first, second = x_BSHd.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHd.dtype)


class Attention(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.heads = model.heads
        self.kv_heads = model.kv_heads or model.heads
        self.head_dim = model.head_width
        self.wq = Linear(model.dim, self.heads * self.head_dim, model.qkv_bias)
        self.wk = Linear(model.dim, self.kv_heads * self.head_dim, model.qkv_bias)
        self.wv = Linear(model.dim, self.kv_heads * self.head_dim, model.qkv_bias)
        self.wo = Linear(self.heads * self.head_dim, model.dim)
        self.q_norm = qk_norm(model, self.heads)
        self.k_norm = qk_norm(model, self.kv_heads)
        self.gather: Callable[[Tensor], Tensor] | None = None
        """From keys and values of these tokens (B, S, 2 * H * d) to those of all tokens that they may attend to: all-gathers
        over ranks (parallel/context.py), or appends to a cache (generate/cache.py). None: these are all tokens."""
        self.gathered_width = 2 * self.kv_heads * self.head_dim
        """Numbers per token that `gather` exchanges, over all tensor-parallel ranks."""

    def score_flops(self, seq_len: int) -> int:
        """FLOPs per token of scores and weighted values, forward and backward; the causal mean context is seq_len / 2."""
        return 6 * seq_len * self.heads * self.head_dim

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        """(B, S, D) -> (B, S, D). mask: see masks.py; None: causal."""
        batch, seq, _ = x_BSD.shape
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        if isinstance(self.q_norm, ProjectionNorm) and isinstance(self.k_norm, ProjectionNorm):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.view(batch, seq, -1, self.head_dim) for x in (q, k, v))
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.gather is not None:
            kv = self.gather(torch.cat([k, v], dim=2).flatten(2))
            k, v = kv.view(batch, kv.shape[1], -1, self.head_dim).chunk(2, dim=2)
        dtype = product_dtype(q)
        q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
        out_BHSd = attend(q, k, v, mask)
        return self.wo(out_BHSd.transpose(1, 2).reshape(batch, seq, -1).to(x_BSD.dtype))
