"""Weighted sums over tokens, expert loads and top-k: small operations that several losses share.

T tokens, E experts, K chosen experts; a leading dimension B of sequences is allowed where it is said.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_ext.collectives import Group, all_sum
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops import select


def accumulate(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(accumulation_dtype(x.dtype))


def mean_weights(values: Tensor, shape: Sequence[int] | torch.Size) -> Tensor:
    """The weights of a plain mean over `shape` tokens: 1/T each, in the dtype and on the device of `values`."""
    count = 1
    for size in shape:
        count *= size
    return torch.full(tuple(shape), 1.0 / max(count, 1), dtype=values.dtype, device=values.device)


def weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """`sum_i weights_i values_i`; weights are 1/T when not given."""
    if weights is None:
        weights = mean_weights(values, values.shape)
    return (values * weights.to(values.dtype)).sum()


def weighted_mean(values: Tensor, weights: Tensor, group: Group | None) -> Tensor:
    """Mean over the tokens of all ranks of a group, without a gradient: (..., T, E), (..., T) -> (..., E).

    weights need not sum to 1. 0 where no token has weight.
    """
    sums = (weights.unsqueeze(-2) @ values.detach()).squeeze(-2)
    sums, total = all_sum(torch.cat([sums, weights.sum(-1, keepdim=True)], dim=-1), group).split(
        [values.shape[-1], 1], -1
    )
    return sums / torch.where(total > 0, total, 1.0)


def normalize_scores(scores: Tensor, log_scores: Tensor | None = None) -> Tensor:
    """Scores divided by their sum over experts: (..., E) -> (..., E). Softmax scores do not change.

    log_scores: (..., E), the logarithms of the scores up to a constant per row; where a row of scores underflows, its
    result and gradient are computed from them (sigmoids underflow in float32 when all logits are below about -88). Without
    them such a row is divided without a gradient, and a row of zeros becomes 1/E everywhere.
    """
    sums = scores.sum(-1, keepdim=True)
    limits = torch.finfo(scores.dtype)
    # Below this, scores lose digits and 1 / sum is so large that gradients overflow.
    underflown = sums.abs() < limits.tiny / limits.eps
    if log_scores is not None:
        others = log_scores.softmax(-1)
    else:
        others = scores.detach() / limits.tiny + (sums == 0)
        others = others / others.sum(-1, keepdim=True)
    return torch.where(underflown, others, scores / torch.where(underflown, 1.0, sums))


def expert_load(topk_ids: Tensor, experts: int, weights: Tensor) -> Tensor:
    """Assignments per expert, each counted with its token's weight, without a gradient.

    topk_ids: (..., T, K) int64, weights: (..., T). Returns (..., E).
    """
    load = weights.new_zeros(*topk_ids.shape[:-2], experts)
    per_assignment = weights.detach().unsqueeze(-1).expand(topk_ids.shape).flatten(-2)
    return load.scatter_add(-1, topk_ids.flatten(-2), per_assignment)


def load_shares(load: Tensor) -> Tensor:
    """f, each expert's fraction of the assignments: (..., E) -> (..., E), all 0 where there are none."""
    total = load.sum(-1, keepdim=True)
    return torch.where(total > 0, load / torch.where(total > 0, total, 1.0), 0.0)


def labelled_counts(topk_ids_TK: Tensor, experts: int, weights_T: Tensor) -> Tensor:
    """Assignments per expert of the tokens that carry a label (weight above 0): (E,) int64."""
    labelled = (weights_T > 0).to(torch.int64).unsqueeze(1).expand_as(topk_ids_TK)
    counts = torch.zeros(experts, dtype=torch.int64, device=topk_ids_TK.device)
    return counts.scatter_add(0, topk_ids_TK.flatten(), labelled.flatten())


def largest_ids(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row: (T, E) -> (T, count) int64. On a CPU four times as fast as `topk`."""
    kernel = select.direct_kernel("largest", scores)
    if scores.dim() != 2 or kernel is None:
        return scores.topk(count, dim=-1).indices
    if not 0 < count <= scores.shape[1]:
        raise ValueError(f"{count} of {scores.shape[1]} scores can't be chosen")
    ids = torch.empty(scores.shape[0], count, dtype=torch.int64)
    kernel(scores.contiguous(), ids)
    return ids


def gates_by_row(gates_TK: Tensor, rows_TK: Tensor) -> Tensor:
    """The gate weight of each of the R = T K rows, in the order of the experts: (T, K), (T, K) -> (R,). rows: int64."""
    return gates_TK.new_zeros(gates_TK.numel()).scatter(0, rows_TK.flatten(), gates_TK.flatten())
