"""Moves a batch to the device, in the form that the model takes."""

import torch
from torch import Tensor

from titan_moe.data.loader import Batch
from titan_moe.model.transformer import Inputs


def to_inputs(batch: Batch, dtype: torch.dtype, device: torch.device, step: int = 0, fraction: float = 1.0) -> Inputs:
    """The batch on `device`, as `Transformer.forward` takes it. Copies from pinned memory are asynchronous.

    dtype: of the token weights (1 / label count of the global batch for labelled tokens, else 0), at least float32.
    step, fraction: see `Inputs`.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Inputs(
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        document_ids=move(batch.document_ids),
        positions=move(batch.positions),
        token_weights=move(batch.loss_mask).to(dtype) / max(batch.label_count, 1),
        sequences=move(batch.sequences),
        step=torch.full((), step, dtype=torch.int64, device=device),
        sequence_positions=torch.arange(batch.tokens.shape[1], device=device),
        fraction=fraction,
    )
