"""Batches from token shards.

The token stream is cut into windows of S + 1 tokens that overlap by one, so every token is predicted once; the last window
is padded, so none is dropped. Which window is sequence k of step n is a pure function of (seed, n, k): a permutation of the
windows for each epoch, computed, not stored. So a run resumes anywhere, on any number of ranks, with nothing to replay.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_moe.data.shards import TokenStream


class Batch(NamedTuple):
    """B sequences of S tokens; tensors are (B, S) unless it is said otherwise."""

    tokens: Tensor
    """int64."""
    labels: Tensor
    """int64, the next token; any valid id where `loss_mask` is False."""
    loss_mask: Tensor
    """bool: False on padding and where the next token belongs to another document."""
    document_ids: Tensor
    """int64, equal inside a document."""
    positions: Tensor
    """int64, position inside the window (or inside the document, with `model.document_mask`)."""
    sequences: Tensor
    """(B,) int64, index of each sequence in the global batch."""
    label_count: int
    """Labelled tokens of the whole global batch, this part and all others."""

    def padded(self, size: int) -> "Batch":
        """With sequences without any label after its own, to `size` of them: so that no rank is left without one."""
        missing = size - self.tokens.shape[0]
        if missing == 0:
            return self
        rows = torch.cat([torch.arange(self.tokens.shape[0]), torch.zeros(missing, dtype=torch.int64)])
        mask = self.loss_mask[rows]
        mask[-missing:] = False
        tensors = (self.document_ids[rows], self.positions[rows], self.sequences[rows])
        return Batch(self.tokens[rows], self.labels[rows], mask, *tensors, self.label_count)

    def part(self, start: int, size: int) -> "Batch":
        """`size` sequences from `start` on; the label count stays that of the whole."""
        rows = slice(start, start + size)
        return Batch(
            self.tokens[rows],
            self.labels[rows],
            self.loss_mask[rows],
            self.document_ids[rows],
            self.positions[rows],
            self.sequences[rows],
            self.label_count,
        )

    def split(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator["Batch"]:
        """Micro-batches of `size` sequences for this of the ranks: micro-step m holds sequences `m * size * ranks` and on, the
        first `size` of them for rank 0."""
        for start in range(0, self.tokens.shape[0], size * ranks):
            yield self.part(start + rank * size, size)


class Windows:
    """One split as numbered windows."""

    def __init__(self, stream: TokenStream, seq_len: int, pad_id: int, document_positions: bool = False) -> None:
        """document_positions: count positions from each document's start."""
        self.stream, self.seq_len, self.pad_id = stream, seq_len, pad_id
        self.document_positions = document_positions

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.seq_len)

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """The windows `indices` as a batch of their own."""
        starts = indices[:, None] * self.seq_len
        places = starts + np.arange(self.seq_len + 1)
        exists = places < len(self.stream)
        ids = np.full(places.shape, self.pad_id, dtype=np.int64)
        for row, index in enumerate(indices):
            found = self.stream.read(int(index) * self.seq_len, int(index) * self.seq_len + self.seq_len + 1)
            ids[row, : len(found)] = found
        documents = np.where(exists, self.stream.documents_at(places), -1)
        mask = exists[:, 1:] & (documents[:, 1:] == documents[:, :-1])
        positions = places[:, :-1] - starts
        if self.document_positions:
            first = np.maximum(self.stream.starts[documents[:, :-1]], starts)
            positions = np.where(exists[:, :-1], places[:, :-1] - first, 0)
        return Batch(
            _tensor(ids[:, :-1]),
            _tensor(ids[:, 1:]),
            _tensor(mask),
            _tensor(documents[:, :-1]),
            _tensor(positions),
            torch.arange(len(indices)),
            int(mask.sum()),
        )


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def permuted(index: npt.NDArray[np.int64], size: int, key: int) -> npt.NDArray[np.int64]:
    """A pseudo-random permutation of range(size), evaluated at `index`: a four-round Feistel network, cycle-walked.

    Costs O(1) memory at any size and is the same in every version of every library.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    value = index.astype(np.uint64)
    pending = np.ones(value.shape, dtype=bool)
    while pending.any():
        left, right = value[pending] >> np.uint64(half), value[pending] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right + np.uint64(_key(key, turn))) & mask)
        value[pending] = (left << np.uint64(half)) | right
        pending = value >= np.uint64(size)
    return value.astype(np.int64)


def _key(key: int, turn: int) -> int:
    return (key * 0x9E3779B97F4A7C15 + (turn + 1) * 0xD1B54A32D192ED03) % 2**63


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TrainingSteps(IterableDataset[Batch]):
    """The global batches of a run, one per step, from any step on."""

    def __init__(self, windows: Windows, batch_size: int, seed: int) -> None:
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.step = 0

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Windows of the sequences 0 .. B-1 of a step (counted from 0)."""
        count = len(self.windows)
        place = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        found = np.empty_like(place)
        for epoch in np.unique(place // count):
            now = place // count == epoch
            found[now] = permuted(place[now] % count, count, self.seed * 1_000_003 + int(epoch))
        return found

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self.windows.batch(self.indices(self.step))
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


def training_loader(windows: Windows, batch_size: int, seed: int) -> StatefulDataLoader:
    """A stateful loader of global batches, one per step."""
    return StatefulDataLoader(TrainingSteps(windows, batch_size, seed), batch_size=None, num_workers=0)


def validation_batches(windows: Windows, sequences: int, size: int) -> Iterator[Batch]:
    """The first `sequences` windows (0: all), always the same ones, `size` at a time."""
    count = min(sequences or len(windows), len(windows))
    for start in range(0, count, size):
        indices = np.arange(start, min(start + size, count), dtype=np.int64)
        yield windows.batch(indices)._replace(sequences=torch.from_numpy(indices))
