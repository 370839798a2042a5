"""Rotary positions: each pair (x_j, x_{j + w/2}) of a head's first w elements turned by its token's angle.

One program per token, over blocks of its heads. Products and sums are in float32.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

VALUES, WARPS = 1024, 4
"""Pairs of a block of heads, about."""


@triton.jit
def rotate_kernel(
    x,  # (N, H, d): N tokens, H heads
    cos,  # (N, HALF) float32
    sin,  # (N, HALF) float32
    out,  # (N, H, d) out
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BACK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, HALF_P)
    c = tl.load(cos + token * HALF + j, mask=j < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + j, mask=j < HALF, other=0.0)[None, :]
    if BACK:
        s = -s
    for start in tl.range(0, HEADS, BLOCK):
        head = start + tl.arange(0, BLOCK)
        at = (token * HEADS + head)[:, None] * WIDTH + j[None, :]
        mask = (head < HEADS)[:, None] & (j < HALF)[None, :]
        first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
        tl.store(out + at + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=mask)
        if REST_P > 0:  # elements that are not turned
            rest = 2 * HALF + tl.arange(0, REST_P)
            at = (token * HEADS + head)[:, None] * WIDTH + rest[None, :]
            mask = (head < HEADS)[:, None] & (rest < WIDTH)[None, :]
            tl.store(out + at, tl.load(x + at, mask=mask, other=0.0), mask=mask)


def sizes(heads: int, width: int, half: int) -> dict[str, int]:
    """The kernel's constants beside BACK."""
    half_p, rest = triton.next_power_of_2(half), width - 2 * half
    block = min(triton.next_power_of_2(heads), max(1, VALUES // half_p))
    return {
        "HEADS": heads, "WIDTH": width, "HALF": half, "HALF_P": half_p,
        "REST_P": triton.next_power_of_2(rest) if rest else 0, "BLOCK": block,
    }  # fmt: skip


def rotate(x_NHd: Tensor, cos: Tensor, sin: Tensor, out_NHd: Tensor, back: bool) -> None:
    """Writes x turned by the angles, or back by them. cos, sin: (N, w/2). All contiguous."""
    tokens, heads, width = x_NHd.shape
    if tokens:
        with torch.cuda.device_of(x_NHd):
            rotate_kernel[(tokens,)](
                x_NHd, cos, sin, out_NHd, **sizes(heads, width, cos.shape[1]), BACK=back, num_warps=WARPS
            )
