"""Key-value cache: keys and values of every token are computed once, so a new token costs the work of one token.

The model does not know of it. While a cache is attached, attention appends the keys and values of new tokens to it, where
context parallelism would all-gather them, and gets those of all tokens back.

B rows, S new tokens per row, L slots in use, W = 2 * H * d numbers per token: keys and values of H heads of width d.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from titan_moe.model.transformer import Inputs, Transformer


class KeyValueCache:
    """Keys and values of the tokens so far of B texts. Text b has its tokens in the first `lengths[b]` slots of row b.

    Slots after these hold zeros or padding, and no token attends to them.
    """

    def __init__(self, texts: int, device: torch.device) -> None:
        self.device = device
        self.lengths = [0] * texts
        self.layers: dict[int, Tensor] = {}
        """By layer, (B, capacity, W)."""
        self.slots_BS = torch.zeros(texts, 0, dtype=torch.int64, device=device)
        """Where the new tokens go."""
        self.end = 0
        """L: one more than the last slot of the new tokens."""

    def reserve(self, count: int) -> Tensor:
        """The slots of `count` new tokens per row, (B, count): also their positions in the texts."""
        starts = torch.tensor(self.lengths, dtype=torch.int64, device=self.device)
        self.slots_BS = starts.unsqueeze(1) + torch.arange(count, device=self.device)
        self.end = max(self.lengths) + count
        return self.slots_BS

    def append(self, layer: int, kv_BSW: Tensor) -> Tensor:
        """Stores keys and values of new tokens; returns those of all slots in use, (B, L, W)."""
        kept = self.layers.get(layer)
        capacity = 0 if kept is None else kept.shape[1]
        if capacity < self.end:
            grown = kv_BSW.new_zeros(len(self.lengths), max(self.end, 2 * capacity), kv_BSW.shape[2])
            if kept is not None:
                grown[:, :capacity] = kept
            kept = self.layers[layer] = grown
        assert kept is not None
        rows_B1 = torch.arange(len(self.lengths), device=self.device).unsqueeze(1)
        kept[rows_B1, self.slots_BS] = kv_BSW
        return kept[:, : self.end]

    def mask(self, indices_S: Tensor, document_ids: Tensor | None, _dtype: torch.dtype) -> Tensor | None:  # noqa: ARG002 - make_mask's signature
        """Which (new token, slot) pairs may attend, (B, S, L) bool; None at the start: causal. A row is one document."""
        if not any(self.lengths):
            return None
        return torch.arange(self.end, device=self.device) <= self.slots_BS.unsqueeze(2)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.lengths = [self.lengths[row] for row in rows]
        self.layers = {layer: kept.index_select(0, index) for layer, kept in self.layers.items()}


@contextlib.contextmanager
def attached(model: Transformer, cache: KeyValueCache) -> Iterator[None]:
    """Lets a model read and fill a cache. On tensor-parallel ranks each has the keys and values of its own heads."""
    attentions = [block.attention for block in model.blocks()]
    assert all(attention.gather is None for attention in attentions), (
        "under context parallelism a rank has only some of the tokens"
    )
    make_mask = model.make_mask
    model.make_mask = cache.mask
    for layer, attention in enumerate(attentions):
        attention.gather = functools.partial(cache.append, layer)
    try:
        yield
    finally:
        model.make_mask = make_mask
        for attention in attentions:
            attention.gather = None


@torch.no_grad()
def extend(model: Transformer, cache: KeyValueCache, new: Sequence[Sequence[int]]) -> Tensor:
    """Appends tokens to every text of a cache. Returns the logits after each text's last token, (B, V), in at least float32.

    new: per text, at least one token. Shorter rows are padded at the end; later tokens overwrite the padding's slots."""
    longest = max(map(len, new))
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in new]
    tokens_BS = torch.tensor(padded, dtype=torch.int64, device=cache.device)
    last_B = [row * longest + len(ids) - 1 for row, ids in enumerate(new)]
    inputs = inference_inputs(tokens_BS, cache.reserve(longest))
    with attached(model, cache):
        logits_BV = model.logits(inputs, torch.tensor(last_B, device=cache.device))
    cache.lengths = [length + len(ids) for length, ids in zip(cache.lengths, new, strict=True)]
    return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))


def inference_inputs(tokens_BS: Tensor, positions_BS: Tensor) -> Inputs:
    """Rows of one document each, without labels."""
    batch, count = tokens_BS.shape
    device = tokens_BS.device
    return Inputs(
        tokens=tokens_BS,
        labels=tokens_BS,
        document_ids=torch.zeros_like(tokens_BS),
        positions=positions_BS,
        token_weights=torch.zeros(batch, count, device=device),
        sequences=torch.arange(batch, device=device),
        step=torch.zeros((), dtype=torch.int64, device=device),
        sequence_positions=torch.arange(count, device=device),
        fraction=0.0,
    )
