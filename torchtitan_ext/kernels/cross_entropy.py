"""Cross-entropy of a slice of logits and its gradient, which takes the place of the logits.

t tokens, V vocabulary (this rank's part). One program per token, which reads its row twice: for the largest value and the
sum of exponentials, then, while the row is in the GPU's cache, for the gradient. Sums are in float32.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

BLOCK, WARPS = 4096, 8


@triton.jit
def cross_entropy_kernel(
    logits,  # (t, V); the gradient takes its place if GRADIENT
    columns,  # (t,) int64, the label's column; below 0 or not below V: it is another rank's
    weights,  # (t,) float32, read if GRADIENT
    highest,  # (t,) float32: the largest logit; out if STATISTICS, else read
    sums,  # (t,) float32: the sum of exp(logit - highest); out if STATISTICS, else read
    label_logits,  # (t,) float32 out if STATISTICS; 0 where the label is another rank's
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * V
    label = tl.load(columns + token)
    if STATISTICS:
        peak = -float("inf")
        total = 0.0
        for start in tl.range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            value = tl.load(row + col, mask=col < V, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(peak, tl.max(value, 0))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(value - higher), 0)
            peak = higher
        here = (label >= 0) & (label < V)
        chosen = tl.load(row + tl.where(here, label, 0)).to(tl.float32)
        tl.store(highest + token, peak)
        tl.store(sums + token, total)
        tl.store(label_logits + token, tl.where(here, chosen, 0.0))
        tl.debug_barrier()  # all threads have read the label's logit before one overwrites it
    else:
        peak = tl.load(highest + token)
        total = tl.load(sums + token)
    if GRADIENT:
        weight = tl.load(weights + token)
        scale = weight / total
        for start in tl.range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            value = tl.load(row + col, mask=col < V, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(value - peak) * scale - tl.where(col == label, weight, 0.0)
            tl.store(row + col, gradient.to(logits.dtype.element_ty), mask=col < V)


def launch(
    logits_tV: Tensor,
    columns_t: Tensor,
    weights_t: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor],
    gradient: bool,
) -> None:
    """Writes the statistics if there are three (highest, sums, label_logits), and the gradient if asked. All contiguous."""
    highest_t, sums_t = statistics[:2]
    if logits_tV.shape[0]:
        with torch.cuda.device_of(logits_tV):
            cross_entropy_kernel[(logits_tV.shape[0],)](
                logits_tV, columns_t, weights_t, highest_t, sums_t, statistics[-1], V=logits_tV.shape[1], BLOCK=BLOCK,
                STATISTICS=len(statistics) == 3, GRADIENT=gradient, num_warps=WARPS,
            )  # fmt: skip
