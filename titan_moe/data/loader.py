"""How a training batch comes about, from token shards to the micro-batches of one rank.

1. A split is one long stream of tokens (`shards.TokenStream`): documents `bos ids... eos`, one after the other. `Windows`
   cuts it into windows of S + 1 tokens that overlap by one, so every token is predicted once. The last window is padded.
2. Sequence k of step n is a window. `step_windows` computes its number from (seed, n, k) alone: each epoch is a
   pseudo-random permutation of the windows, evaluated where it is needed and not stored (`permuted`).
3. Each data rank builds only its own sequences (`DataRank`). Micro-step m of M holds sequences m * B / M to
   (m + 1) * B / M - 1 of the global batch of B; within them, rank r has `size` sequences from r * size on.
4. The loss is a mean over the labelled tokens of the global batch. Each rank computes their number from window and document
   boundaries (`Windows.label_count`), without the tokens of other ranks and without a collective.
5. `TrainingLoader` builds two steps ahead in a thread and, for a GPU, copies them to pinned memory in another thread.
   Threads suffice, since NumPy on memory-mapped files mostly runs without the GIL. Unlike worker processes they get no
   signals, and none is left behind when the trainer is killed.

So the loader has no state but the number of steps taken: a run resumes at any step, on any number of ranks.
"""

import itertools
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchdata.nodes import BaseNode, IterableWrapper, PinMemory, Prefetcher

from titan_moe.data.shards import TokenStream

Indices = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Some sequences of a global batch: B sequences of S tokens. Tensors are (B, S) unless another shape is given."""

    tokens: Tensor
    """int64."""
    labels: Tensor
    """int64, the next token; any valid id where `loss_mask` is False."""
    loss_mask: Tensor
    """bool: False on padding and where the next token belongs to another document."""
    document_ids: Tensor
    """int64, equal for tokens of the same document; -1 on padding."""
    positions: Tensor
    """int64, position in the window (in the document, with `model.document_mask`)."""
    sequences: Tensor
    """(B,) int64, index of each sequence in the global batch."""
    label_count: int
    """Labelled tokens of the global batch: all sequences of the step, of all ranks."""

    def rows(self, index: slice | Tensor) -> "Batch":
        """The sequences at `index`. The label count stays that of the global batch."""
        return Batch._make([*(tensor[index] for tensor in self[:6]), self.label_count])

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` consecutive sequences. The last one may be smaller."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.tokens), size)]


class DataRank(NamedTuple):
    """One of the ranks that the sequences of a global batch are divided among."""

    size: int
    """Sequences per rank in one micro-step."""
    rank: int = 0
    ranks: int = 1

    def rows(self, batch_size: int) -> Indices:
        """Indices of this rank's sequences in a global batch of `batch_size`, in order of micro-steps."""
        rows = np.arange(batch_size, dtype=np.int64)
        return rows[rows // self.size % self.ranks == self.rank]


class Windows:
    """One split as numbered windows. Window i holds the stream's tokens from i * S to i * S + S, both included."""

    def __init__(self, stream: TokenStream, seq_len: int, pad_id: int, document_positions: bool = False) -> None:
        """document_positions: positions restart at 0 in each document."""
        self.stream, self.seq_len, self.pad_id = stream, seq_len, pad_id
        self.document_positions = document_positions

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.seq_len)

    def tokens(self, indices: Indices) -> Indices:
        """(B, S + 1) token ids of windows, padded past the end of the stream."""
        return self.stream.rows(indices * self.seq_len, self.seq_len + 1, self.pad_id)

    def first_documents(self, indices: Indices) -> tuple[Indices, Indices]:
        """(B,) the document of each window's first token, and (B,) the number of documents that start after that token."""
        starts = indices * self.seq_len
        first = self.stream.documents_at(starts)
        return first, self.stream.documents_at(starts + self.seq_len) - first

    def label_count(self, indices: Indices) -> int:
        """The number of labelled tokens in these windows: tokens with a next token in the stream, minus those whose next
        token starts a document. Reads no tokens."""
        following = np.minimum(len(self.stream) - 1 - indices * self.seq_len, self.seq_len)
        return int(following.sum() - self.first_documents(indices)[1].sum())

    def batch(self, indices: Indices, rows: Indices | slice = slice(None)) -> Batch:
        """The sequences `rows` of the global batch that consists of the windows `indices`."""
        own = indices[rows]
        starts, columns = own[:, None] * self.seq_len, np.arange(self.seq_len + 1)
        exists = columns < len(self.stream) - starts
        first, boundaries = self.first_documents(own)
        row = np.repeat(np.arange(len(own)), boundaries)
        earlier = np.cumsum(boundaries) - boundaries
        document = first[row] + 1 + np.arange(len(row)) - earlier[row]
        starts_document = np.zeros(exists.shape, dtype=bool)
        starts_document[row, self.stream.starts[document] - starts[row, 0]] = True
        documents = np.where(exists, first[:, None] + np.cumsum(starts_document, axis=1), -1)[:, :-1]
        positions = np.broadcast_to(columns[:-1], documents.shape)
        if self.document_positions:
            offset = np.maximum(self.stream.starts[documents] - starts, 0)
            positions = np.where(exists[:, :-1], positions - offset, 0)
        ids = self.tokens(own)
        mask = exists[:, 1:] & ~starts_document[:, 1:]
        arrays = (ids[:, :-1], ids[:, 1:], mask, documents, positions, np.arange(len(indices))[rows])
        return Batch._make([*(torch.from_numpy(array.copy()) for array in arrays), self.label_count(indices)])


def permuted(index: Indices, size: int, key: int) -> Indices:
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


def step_windows(count: int, batch_size: int, seed: int, step: int) -> Indices:
    """(B,) the windows, of `count`, that are the sequences of a step's global batch. step: counted from 0."""
    sample = step * batch_size + np.arange(batch_size, dtype=np.int64)
    windows = np.empty_like(sample)
    for epoch in np.unique(sample // count):
        in_epoch = sample // count == epoch
        windows[in_epoch] = permuted(sample[in_epoch] % count, count, seed * 1_000_003 + int(epoch))
    return windows


class StepData(NamedTuple):
    """What one rank reads for one optimizer step."""

    micro_batches: list[Batch]
    data_crc: int | None
    """CRC-32 of the global batch's tokens as int64 bytes; None unless `TrainingLoader.checksum`."""


@dataclass(frozen=True)
class TrainingLoader:
    """The training data of one rank."""

    windows: Windows
    batch_size: int
    """Sequences in the global batch."""
    seed: int
    part: DataRank
    checksum: bool = False
    """Compute `StepData.data_crc`. Reads all tokens of the global batch."""
    pin: bool = False
    """Put tensors into pinned memory, for asynchronous copies to a CUDA device."""

    def build(self, step: int) -> StepData:
        """The data of a step, counted from 0."""
        indices = step_windows(len(self.windows), self.batch_size, self.seed, step)
        batch = self.windows.batch(indices, self.part.rows(self.batch_size))
        crc = 0
        for some in np.array_split(indices, self.part.ranks) if self.checksum else ():
            crc = zlib.crc32(self.windows.tokens(some)[:, :-1].tobytes(), crc)
        return StepData(batch.split(self.part.size), crc if self.checksum else None)

    def steps(self, first: int = 0) -> Generator[StepData, None, None]:
        """All steps from `first` on, without end. Close the generator to stop the threads."""
        steps: BaseNode[StepData] = Prefetcher(
            IterableWrapper(map(self.build, itertools.count(first))), prefetch_factor=2
        )
        yield from PinMemory(steps) if self.pin else steps


def validation_batches(windows: Windows, sequences: int, part: DataRank) -> Iterator[Batch]:
    """A rank's sequences of the first `sequences` windows (0: all), `part.size` at a time and always in the same order.

    With several ranks each batch has `part.size` sequences on every rank, so that none is left without work: where the text
    does not fill the last batch, repeated sequences without labels do. `Batch.sequences` holds window numbers here.
    """
    count = min(sequences or len(windows), len(windows))
    for start in range(0, count, part.size * part.ranks):
        indices = np.arange(start, min(start + part.size * part.ranks, count), dtype=np.int64)
        rows = part.rows(part.size * part.ranks if part.ranks > 1 else len(indices))
        exists = rows < len(indices)
        rows = np.where(exists, rows, 0)
        batch = windows.batch(indices, rows)
        mask = batch.loss_mask & torch.from_numpy(exists).unsqueeze(1)
        yield batch._replace(loss_mask=mask, sequences=torch.from_numpy(indices[rows]))
