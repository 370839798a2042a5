"""How a training batch comes about, from token shards to the micro-batches of one rank.

1. A split is one long stream of documents, `bos ids... eos` each (`shards.TokenStream`). `Windows` cuts it into windows of
   S + 1 tokens that overlap by one, so every token is predicted once. The last window is padded.
2. Sequence k of step n is a window. Its number is computed from (seed, n, k) alone (`step_windows`): each epoch is a
   pseudo-random permutation of the windows, which is evaluated where it is needed and never stored (`permuted`).
3. Each data rank builds only its own sequences (`DataRank`). Micro-step m of M holds sequences m * B / M to
   (m + 1) * B / M - 1 of the global batch of B; within them, rank r has `size` sequences from r * size on.
4. The loss is a mean over the labelled tokens of the global batch. Each rank computes their number from window and document
   boundaries (`Windows.label_count`), without the tokens of other ranks and without a collective.
5. `TrainingLoader` builds two steps ahead in a thread; for a GPU, another thread copies them to pinned memory. Unlike worker
   processes, threads get no signals and cannot outlive the trainer. NumPy releases the GIL for most of the work.

So the loader has no state but the number of steps taken: a run resumes at any step, on any number of ranks.
"""

import contextlib
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


class Closed(Exception):
    """The loader was closed while it waited for tokens."""


Indices = npt.NDArray[np.int64]
StepData = tuple[list["Batch"], int | None]
"""The microbatches of one rank in one optimizer step, and the checksum logged as `data_crc`, or None if `checksum` is off."""


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

    def of_step(self, batch_size: int, seed: int, step: int) -> Indices:
        """(B,) the windows that are the sequences of a step's global batch. step: counted from 0."""
        return step_windows(len(self), batch_size, seed, step)

    def close(self) -> None:
        """Ends a wait for tokens (`StreamedWindows`), which then raises Closed."""

    def tokens(self, indices: Indices) -> Indices:
        """(B, S + 1) token ids of windows, padded past the end of the stream."""
        return self.stream.rows(indices * self.seq_len, self.seq_len + 1, self.pad_id)

    def label_count(self, indices: Indices) -> int:
        """The number of labelled tokens in windows: those with a next token, minus those whose next token starts a document.

        Reads no tokens. Relies on documents never being empty."""
        starts = indices * self.seq_len
        last_labels = np.minimum(starts + self.seq_len, len(self.stream) - 1)
        boundaries = self.stream.documents_at(last_labels) - self.stream.documents_at(starts)
        return int((last_labels - starts - boundaries).sum())

    def batch(self, indices: Indices, rows: Indices | slice = slice(None)) -> Batch:
        """The sequences `rows` of the global batch that consists of the windows `indices`."""
        own = indices[rows]
        starts, columns = own[:, None] * self.seq_len, np.arange(self.seq_len + 1)
        exists = columns < len(self.stream) - starts
        documents = np.where(exists, self.stream.documents_at(starts + columns), -1)
        positions = np.broadcast_to(columns, exists.shape)
        if self.document_positions:
            positions = np.where(exists, columns - np.maximum(self.stream.starts_of(documents) - starts, 0), 0)
        ids, sequences = self.tokens(own), np.arange(len(indices))[rows]
        mask = exists[:, 1:] & (documents[:, 1:] == documents[:, :-1])
        arrays = (ids[:, :-1], ids[:, 1:], mask, documents[:, :-1], positions[:, :-1], sequences)
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


@dataclass(frozen=True)
class TrainingLoader:
    """The training data of one rank."""

    windows: Windows
    batch_size: int
    """Sequences in the global batch."""
    seed: int
    part: DataRank
    checksum: bool = False
    """Compute the CRC-32 of the global batch's token ids (as int64). This rank then reads the tokens of all ranks."""
    pin: bool = False
    """Put tensors into pinned memory, for asynchronous copies to a CUDA device."""

    def build(self, step: int) -> StepData:
        """The data of a step. Counted from 0 here: training step n is `build(n - 1)`."""
        indices = self.windows.of_step(self.batch_size, self.seed, step)
        batch = self.windows.batch(indices, self.part.rows(self.batch_size))
        crc = 0
        for some in np.array_split(indices, self.part.ranks) if self.checksum else ():
            crc = zlib.crc32(self.windows.tokens(some)[:, :-1].tobytes(), crc)
        return batch.split(self.part.size), crc if self.checksum else None

    def built(self, first: int) -> Iterator[StepData]:
        """The data of all steps from `first` on, until the windows are closed."""
        with contextlib.suppress(Closed):
            yield from map(self.build, itertools.count(first))

    def steps(self, first: int = 0) -> Generator[StepData, None, None]:
        """All steps from `first` on, without end. Close the generator to stop the threads."""
        steps: BaseNode[StepData] = Prefetcher(IterableWrapper(self.built(first)), prefetch_factor=2)
        try:
            yield from PinMemory(steps) if self.pin else steps
        finally:
            self.windows.close()


def validation_batches(windows: Windows, sequences: int, part: DataRank) -> Iterator[Batch]:
    """A rank's sequences of the first `sequences` windows (0: all), `part.size` at a time and always in the same order.

    With several ranks each batch has `part.size` sequences on every rank, so that none is left without work: a short
    last batch is filled with repeated sequences whose labels are masked out. `Batch.sequences` holds window numbers here.
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
