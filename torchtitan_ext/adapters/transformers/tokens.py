"""From a batch of Transformers to token weights: which tokens carry a label, and which belong to the same document.

B rows of a batch, S tokens in a row, T = B * S, N documents.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def labelled(labels_BS: Tensor, shifted: bool = False, ignored: int = IGNORED) -> Tensor:
    """Whether each token carries a label, (B, S) bool: as in Transformers' loss, token i is scored by label i + 1.

    shifted: label i belongs to token i already (`shift_labels`)."""
    if not shifted:
        labels_BS = F.pad(labels_BS, (0, 1), value=ignored)[..., 1:]
    return labels_BS != ignored


def token_weights(labelled_BS: Tensor, count: Any, dtype: torch.dtype) -> Tensor:
    """(B, S): 1 / count on labelled tokens, 0 elsewhere. count: `num_items_in_batch`, the labelled tokens of all micro-batches
    and ranks of a step; None: those of this batch, as Transformers' loss divides by."""
    weights_BS = labelled_BS.to(dtype)
    if count is None:
        count = weights_BS.sum().clamp(min=1.0)
    elif isinstance(count, Tensor):
        count = count.to(weights_BS)
    return weights_BS / count


class Documents(NamedTuple):
    """The tokens of a batch, one row per document, filled up to the longest."""

    tokens: Tensor
    """(N, M) int64, index of each token among the T; 0 in the filling."""
    real: Tensor
    """(N, M) bool, False in the filling."""


def documents(position_ids: Tensor | None, rows: int, length: int) -> Documents | None:
    """The documents of rows in which several are packed: positions that do not count up begin a new one. None: no row has
    more than one."""
    if position_ids is None or length < 2:
        return None
    positions_BS = position_ids[0] if position_ids.dim() == 3 else position_ids
    if positions_BS.shape[-1] != length:
        return None
    positions_BS = positions_BS.expand(rows, length)
    begins_BS = F.pad(positions_BS[:, 1:] != positions_BS[:, :-1] + 1, (1, 0), value=True)
    if int(begins_BS.sum()) == rows:
        return None
    begins_T = begins_BS.flatten()
    document_T = begins_T.cumsum(0) - 1
    starts_N = begins_T.nonzero().squeeze(1)
    lengths_N = torch.bincount(document_T)
    columns_M = torch.arange(int(lengths_N.max()), device=begins_T.device)
    real = columns_M < lengths_N.unsqueeze(1)
    return Documents(torch.where(real, starts_N.unsqueeze(1) + columns_M, 0), real)
