"""Weighted sums of each token's rows, and their gradients: how expert outputs become tokens.

T tokens, K experts per token (k), R routed rows, D model width. One program per token. Sums and gate weights are in float32.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

BLOCK, WARPS = 256, 2


@triton.jit
def combine_kernel(
    y,  # (R, D)
    rows,  # (T, K) int64
    gates,  # (T, K) float32, read if GATED
    out,  # (T, D) out: sum_a gates[t, a] * y[rows[t, a]]
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for start in tl.range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < D
        acc = tl.zeros((BLOCK,), dtype=tl.float32)
        for a in tl.static_range(K):
            row = tl.load(rows + token * K + a).to(tl.int64)
            value = tl.load(y + row * D + col, mask=mask, other=0.0).to(tl.float32)
            if GATED:
                value *= tl.load(gates + token * K + a)
            acc += value
        tl.store(out + token * D + col, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_backward_kernel(
    d_out,  # (T, D)
    y,  # (R, D)
    rows,  # (T, K) int64
    gates,  # (T, K) float32
    d_y,  # (R, D) out
    d_gates,  # (T, K) float32 out
    D: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, KP)
    valid = choice < K
    row = tl.load(rows + token * K + choice, mask=valid, other=0).to(tl.int64)
    gate = tl.load(gates + token * K + choice, mask=valid, other=0.0)
    d_gate = tl.zeros((KP,), dtype=tl.float32)
    for start in tl.range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = valid[:, None] & (col < D)[None, :]
        at = row[:, None] * D + col[None, :]
        d = tl.load(d_out + token * D + col, mask=col < D, other=0.0).to(tl.float32)
        value = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        d_gate += tl.sum(value * d[None, :], 1)
        tl.store(d_y + at, (gate[:, None] * d[None, :]).to(d_y.dtype.element_ty), mask=mask)
    tl.store(d_gates + token * K + choice, d_gate, mask=valid)


def forward(y_RD: Tensor, rows_TK: Tensor, gates_TK: Tensor | None, out_TD: Tensor) -> None:
    """Writes the sums of each token's rows, times the gate weights if given. All contiguous."""
    tokens, k = rows_TK.shape
    if tokens:
        with torch.cuda.device_of(y_RD):
            combine_kernel[(tokens,)](
                y_RD, rows_TK, out_TD if gates_TK is None else gates_TK, out_TD, D=y_RD.shape[1], K=k, BLOCK=BLOCK,
                GATED=gates_TK is not None, num_warps=WARPS,
            )  # fmt: skip


def backward(
    d_out_TD: Tensor, y_RD: Tensor, rows_TK: Tensor, gates_TK: Tensor, d_y_RD: Tensor, d_gates_TK: Tensor
) -> None:
    """Writes the gradients of rows and gate weights. All contiguous; every row must belong to one token."""
    tokens, k = rows_TK.shape
    if tokens:
        with torch.cuda.device_of(y_RD):
            combine_backward_kernel[(tokens,)](
                d_out_TD, y_RD, rows_TK, gates_TK, d_y_RD, d_gates_TK, D=y_RD.shape[1], K=k,
                KP=triton.next_power_of_2(k), BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
