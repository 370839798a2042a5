"""SwiGLU in one pass, alone or with what sp needs of each token's k activations.

T tokens, K experts per token (k), R routed rows, F expert hidden width.

A program computes a tile of M = 16 rows (more if k > 16): M // KP tokens, KP being k rounded up to a power of two. It goes
over F in blocks. The inner products of the tile's rows are one M x M tensor-core product, whose diagonal blocks are the
tokens' Gram matrices. Products of bfloat16 are exact in its float32 sum. There are no atomics: results are deterministic.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

# What a kernel computes beside SwiGLU.
PLAIN = tl.constexpr(0)
GRAM = tl.constexpr(1)  # each token's Gram matrix, not scaled
COSINES = tl.constexpr(2)  # each token's sum of squared cosines, with its gradient
BLOCK, WARPS, STAGES = 64, 4, 2


@triton.jit
def _load_activations(gate_up, row, col, mask, F: tl.constexpr):
    """gate, up and silu(gate) * up in float32, and the last in the dtype in which z is stored."""
    at = row[:, None] * (2 * F) + col[None, :]
    g = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up + at + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    return g, u, sigmoid, (g * sigmoid * u).to(gate_up.dtype.element_ty)


@triton.jit
def _add_products(x, total, PRECISION: tl.constexpr):
    if PRECISION == "native":
        total = tl.dot(x, tl.trans(x), total)
    else:
        wide = x.to(tl.float32)
        total = tl.dot(wide, tl.trans(wide), total, input_precision=PRECISION)
    return total


@triton.jit
def _row_scale(peak):
    """1 for a row whose largest entry is between 2^-50 and 2^50, or 0; else the power of two that brings it near 1."""
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
    power = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    inside = ((peak >= 8.881784197001252e-16) & (peak <= 1125899906842624.0)) | (peak == 0.0)
    return tl.where(inside, 1.0, power)


@triton.jit
def _tile(rows, tokens, K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr, MODE: tl.constexpr):
    """Token, choice among its k and row of each row of the tile, and whether there is such a row."""
    place = tl.arange(0, M)
    token = tl.program_id(0) * (M // KP) + place // KP
    choice = place % KP
    valid = (token < tokens) & (choice < K)
    row = token.to(tl.int64)  # R * 2F may exceed 2^31
    if MODE != PLAIN:
        row = tl.load(rows + token * K + choice, mask=valid, other=0).to(tl.int64)
    return token, choice, row, valid


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    gate_up,  # (R, 2F)
    rows,  # (T, K) int64: the row of token i's a-th expert; not read if PLAIN
    z,  # (R, F) out: silu(gate) * up
    gram,  # (T, K, K) float32 out if GRAM
    values,  # (T,) float32 out if COSINES: sum over ordered pairs of max(squared cosine - floor, 0)
    overlaps,  # (T,) float32 out if COSINES: the same with floor 0
    slopes,  # (T, K, K) float32 out if COSINES: C with d(value)/d(s_a z_a) = sum_b C_ab s_b z_b, s the scales
    scales,  # (T, K) float32 out if COSINES: what rows are multiplied by so that their squares stay in range
    gates,  # (T, K) float32, of rows (R,) if PLAIN; read if GATED: z is stored times these, products are of z without them
    tokens,
    floor,
    F: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    MODE: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    floor = tl.cast(floor, tl.float32)  # Inductor passes a Python float as float64, which is slow
    token, choice, row, valid = _tile(rows, tokens, K, KP, M, MODE)
    if GATED:
        weight = tl.load(gates + token * K + choice, mask=valid, other=0.0)
    acc = tl.zeros((M, M), dtype=tl.float32)
    for start in tl.range(0, F, BLOCK, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK)
        mask = valid[:, None] & (col < F)[None, :]
        _, _, _, x = _load_activations(gate_up, row, col, mask, F)
        stored = x
        if GATED:
            stored = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
        tl.store(z + row[:, None] * F + col[None, :], stored, mask=mask)
        if MODE != PLAIN:
            acc = _add_products(x, acc, PRECISION)
    place = tl.arange(0, M)
    same = (token[:, None] == token[None, :]) & valid[:, None] & valid[None, :]
    at = token[:, None] * (K * K) + choice[:, None] * K + choice[None, :]
    if MODE == GRAM:
        tl.store(gram + at, acc, mask=same)
    if MODE == COSINES:
        diagonal = place[:, None] == place[None, :]
        norm_a = tl.sum(tl.where(diagonal, acc, 0.0), 1)
        scale = tl.full((M,), 1.0, tl.float32)
        # Squared norms outside of 2^-100 ... 2^100, also 0 and NaN: this tile is computed again from scaled rows.
        inside = (norm_a >= 7.888609052210118e-31) & (norm_a <= 1.2676506002282294e30)
        if tl.sum((valid & (inside == 0)).to(tl.int32), 0) > 0:
            peak = tl.zeros((M,), dtype=tl.float32)
            for start in tl.range(0, F, BLOCK, num_stages=STAGES):
                col = start + tl.arange(0, BLOCK)
                mask = valid[:, None] & (col < F)[None, :]
                _, _, _, x = _load_activations(gate_up, row, col, mask, F)
                peak = tl.maximum(peak, tl.max(tl.abs(x.to(tl.float32)), 1))
            scale = _row_scale(peak)
            acc = tl.zeros((M, M), dtype=tl.float32)
            for start in tl.range(0, F, BLOCK, num_stages=STAGES):
                col = start + tl.arange(0, BLOCK)
                mask = valid[:, None] & (col < F)[None, :]
                _, _, _, x = _load_activations(gate_up, row, col, mask, F)
                x = (x.to(tl.float32) * scale[:, None]).to(x.dtype)
                acc = _add_products(x, acc, PRECISION)
            norm_a = tl.sum(tl.where(diagonal, acc, 0.0), 1)
        norm_b = tl.sum(tl.where(diagonal, acc, 0.0), 0)
        tl.store(scales + token * K + choice, scale, mask=valid)
        zero_a, zero_b = norm_a < 1.1754943508222875e-38, norm_b < 1.1754943508222875e-38  # false for NaN
        inv_a = tl.where(zero_a, 0.0, 1.0 / tl.where(zero_a, 1.0, norm_a))
        inv_b = tl.where(zero_b, 0.0, 1.0 / tl.where(zero_b, 1.0, norm_b))
        slope = acc * inv_a[:, None] * inv_b[None, :]
        square = acc * slope
        pair = same & (place[:, None] != place[None, :])
        counted = pair & ((square > floor) | (square != square))  # NaN counts, so that it reaches the loss
        per_row = tl.sum(tl.where(counted, square - floor, 0.0), 1)
        total = tl.sum(tl.reshape(per_row, (M // KP, KP)), 1)
        first = tl.program_id(0) * (M // KP) + tl.arange(0, M // KP)
        tl.store(values + first, total, mask=first < tokens)
        total = tl.sum(tl.reshape(tl.sum(tl.where(pair, square, 0.0), 1), (M // KP, KP)), 1)
        tl.store(overlaps + first, total, mask=first < tokens)
        kept = tl.where(counted, square, 0.0)
        on_diagonal = -4.0 * inv_a * tl.sum(kept, 1)
        c = tl.where(diagonal, on_diagonal[:, None], tl.where(counted, 4.0 * slope, 0.0))
        tl.store(slopes + at, c, mask=same)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    gate_up,  # (R, 2F)
    rows,  # (T, K) int64, not read if PLAIN
    dz,  # (R, F): the gradient of z as it was stored
    coefficients,  # (T, K, K) float32, not read if PLAIN: the gradient of row a gets sum_b C_ab z_b more
    scales,  # (T, K) float32, read if COSINES: the forward's
    d_values,  # (T,) float32, read if COSINES: what a token's coefficients are multiplied by
    gates,  # the forward's, read if GATED
    d_gate_up,  # (R, 2F) out
    d_gates,  # float32 out if GATED, shaped as gates: inner products of dz and z before the gate
    tokens,
    F: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    MODE: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    token, choice, row, valid = _tile(rows, tokens, K, KP, M, MODE)
    if MODE != PLAIN:
        same = (token[:, None] == token[None, :]) & valid[:, None] & valid[None, :]
        at = token[:, None] * (K * K) + choice[:, None] * K + choice[None, :]
        c = tl.load(coefficients + at, mask=same, other=0.0)
    if MODE == COSINES:
        c *= tl.load(d_values + token, mask=valid, other=0.0)[:, None]
        scale = tl.load(scales + token * K + choice, mask=valid, other=1.0)
    if GATED:
        weight = tl.load(gates + token * K + choice, mask=valid, other=0.0)
        inner = tl.zeros((M,), dtype=tl.float32)
    for start in tl.range(0, F, BLOCK, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK)
        mask = valid[:, None] & (col < F)[None, :]
        d = tl.load(dz + row[:, None] * F + col[None, :], mask=mask, other=0.0).to(tl.float32)
        g, u, sigmoid, x = _load_activations(gate_up, row, col, mask, F)
        if GATED:
            inner += tl.sum(d * x.to(tl.float32), 1)
            d *= weight[:, None]
        if MODE == GRAM:
            d = tl.dot(c, x.to(tl.float32), d, input_precision=PRECISION)
        if MODE == COSINES:
            scaled = x.to(tl.float32) * scale[:, None]
            d += tl.dot(c, scaled, input_precision=PRECISION) * scale[:, None]
        at_gate = row[:, None] * (2 * F) + col[None, :]
        d_gate = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
        tl.store(d_gate_up + at_gate, d_gate.to(gate_up.dtype.element_ty), mask=mask)
        tl.store(d_gate_up + at_gate + F, (d * g * sigmoid).to(gate_up.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(d_gates + token * K + choice, inner, mask=valid)


def tile_sizes(k: int) -> dict[str, int]:
    """The kernels' constants K, KP and M."""
    padded = triton.next_power_of_2(k)
    return {"K": k, "KP": padded, "M": max(16, padded)}


def _launch(
    kernel, mode: int, gated: bool, gate_up: Tensor, tokens: int, k: int, tensors, precision: str, *numbers: float
) -> None:
    sizes = tile_sizes(k)
    grid = (triton.cdiv(tokens, sizes["M"] // sizes["KP"]),)
    if tokens:
        with torch.cuda.device_of(gate_up):
            kernel[grid](
                *tensors, tokens, *numbers, F=gate_up.shape[1] // 2, **sizes, BLOCK=BLOCK, MODE=mode, GATED=gated,
                PRECISION=precision, STAGES=STAGES, num_warps=WARPS,
            )  # fmt: skip


def forward(
    gate_up: Tensor,
    rows_TK: Tensor | None,
    out: dict[str, Tensor],
    floor: float = 0.0,
    gates: Tensor | None = None,
) -> None:
    """Writes z, times the gate weights if given, and what else `out` has room for: gram, or values, overlaps, slopes and
    scales. All contiguous."""
    z = out["z"]
    mode = PLAIN if rows_TK is None else GRAM if "gram" in out else COSINES
    tokens, k = (gate_up.shape[0], 1) if rows_TK is None else rows_TK.shape
    names = ("gram", "values", "overlaps", "slopes", "scales")
    tensors = (gate_up, rows_TK if rows_TK is not None else z, z, *(out.get(name, z) for name in names))
    tensors = (*tensors, z if gates is None else gates)
    precision = "native" if gate_up.dtype == torch.bfloat16 else "ieee"
    _launch(forward_kernel, mode.value, gates is not None, gate_up, tokens, k, tensors, precision, floor)


def backward(
    gate_up: Tensor,
    rows_TK: Tensor | None,
    dz_RF: Tensor,
    d_gate_up: Tensor,
    coefficients_TKK: Tensor | None = None,
    scales_TK: Tensor | None = None,
    d_values_T: Tensor | None = None,
    gates: Tensor | None = None,
    d_gates: Tensor | None = None,
) -> None:
    """Writes d_gate_up, and d_gates if there are gates. coefficients: (T, k, k), with rows. scales and d_values: those of the
    cosines. All contiguous."""
    mode = PLAIN if rows_TK is None else GRAM if d_values_T is None else COSINES
    tokens, k = (gate_up.shape[0], 1) if rows_TK is None else rows_TK.shape
    given = [dz_RF if x is None else x for x in (coefficients_TKK, scales_TK, d_values_T, gates)]
    tensors = (gate_up, rows_TK if rows_TK is not None else dz_RF, dz_RF, *given, d_gate_up)
    tensors = (*tensors, d_gate_up if d_gates is None else d_gates)
    # z in bfloat16 is exact in tf32, and its 11 bits of C are more than a bfloat16 result has.
    precision = "tf32" if gate_up.dtype == torch.bfloat16 else "ieee"
    _launch(backward_kernel, mode.value, gates is not None, gate_up, tokens, k, tensors, precision)
