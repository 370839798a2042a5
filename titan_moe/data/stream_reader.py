"""The training windows of a stream, some of which are not written yet.

Window i holds the stream's tokens from i * S to i * S + S, as of any other corpus. A group is G consecutive windows, as many
as fit `data.shuffle_tokens`. Groups are read in order; within a group, windows are read in the order of a permutation that is
computed from (seed, epoch, group). So the order does not depend on how much is written, only on the definition of the stream.
"""

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan_moe.data.loader import Closed, Indices, Windows, permuted
from titan_moe.data.shards import Manifest, Tokens, TokenStream, verify
from titan_moe.data.streams import StreamFolder, group_windows, tokens_needed

OPEN_SHARDS = 16
"""A memory map keeps a file descriptor: with all shards open, a process would reach its limit."""
POLL_SECONDS = 0.2


class OpenShards:
    """Memory maps of the shards used last. A shard's files are compared with their checksums when they are opened."""

    def __init__(self, stream: StreamFolder) -> None:
        self.stream = stream
        self.open: OrderedDict[int, tuple[Tokens, npt.NDArray[np.int64]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.stream.shards)

    def __getitem__(self, index: int) -> Tokens:
        return self.both(index)[0]

    def both(self, index: int) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Token ids of a shard, and where its documents start in it. Raises UserError for a damaged file."""
        if index in self.open:
            self.open.move_to_end(index)
            return self.open[index]
        facts, stream = self.stream.shards[index], self.stream
        content, documents = stream.path(index, ".bin"), stream.path(index, "-documents.npy")
        verify(content, facts.sha256, content)
        verify(documents, facts.documents_sha256, documents)
        dtype = np.dtype(stream.manifest.dtype)
        ids = np.memmap(content, dtype=dtype, mode="r") if facts.tokens else np.zeros(0, dtype)
        self.open[index] = ids, np.load(documents, mmap_mode="r" if facts.documents else None, allow_pickle=False)
        if len(self.open) > OPEN_SHARDS:
            self.open.popitem(last=False)
        return self.open[index]


class GrowingStream(TokenStream):
    """The tokens of a stream's training split that are there by now."""

    def __init__(self, folder: StreamFolder) -> None:
        self.folder = folder
        self.opened = OpenShards(folder)
        self.maps = self.opened
        self.lock = threading.Lock()
        """The loader's thread and the trainer both look for new shards."""
        self.known(0)

    def known(self, tokens: int) -> bool:
        """Whether so many tokens are there, or all that there will ever be."""
        with self.lock:
            if not self.folder.has(tokens):
                self.folder.update()
            shards = self.folder.shards
            self.ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
            self.first_documents = np.cumsum([0, *(shard.documents for shard in shards)], dtype=np.int64)
            return self.folder.has(tokens)

    def __len__(self) -> int:
        return self.folder.tokens

    def documents_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        inside = np.minimum(positions, len(self) - 1)
        shards = np.searchsorted(self.ends, inside, side="right")
        documents = np.empty(positions.shape, dtype=np.int64)
        for index in np.unique(shards):
            here = shards == index
            start = self.ends[index] - self.folder.shards[index].tokens
            starts = self.opened.both(int(index))[1]
            documents[here] = self.first_documents[index] + np.searchsorted(starts, inside[here] - start, "right") - 1
        return documents

    def starts_of(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        shards = np.searchsorted(self.first_documents, np.maximum(documents, 0), side="right") - 1
        starts = np.empty(documents.shape, dtype=np.int64)
        for index in np.unique(shards):
            here = shards == index
            own = np.maximum(documents[here], 0) - self.first_documents[index]
            start = self.ends[index] - self.folder.shards[index].tokens
            starts[here] = start + self.opened.both(int(index))[1][own]
        return starts


class StreamedWindows(Windows):
    """The windows of a stream in the order of their groups, waiting for those that are not written yet."""

    stream: GrowingStream

    def __init__(self, stream: GrowingStream, seq_len: int, pad_id: int, document_positions: bool = False) -> None:
        super().__init__(stream, seq_len, pad_id, document_positions)
        self.shuffle_tokens = int(stream.folder.definition["shuffle_tokens"])
        self.group = group_windows(seq_len, self.shuffle_tokens)
        self.closed = threading.Event()

    def needed(self, step: int, batch_size: int) -> int:
        """Tokens that must be there for a step (counted from 0), unless the stream ends before them."""
        return tokens_needed(step, batch_size, self.seq_len, self.shuffle_tokens)

    def close(self) -> None:
        self.closed.set()

    def of_step(self, batch_size: int, seed: int, step: int) -> Indices:
        """(B,) the windows of a step. Waits for them. Raises Closed."""
        while not self.stream.known(self.needed(step, batch_size)):
            if self.closed.wait(POLL_SECONDS):
                raise Closed
        sample = step * batch_size + np.arange(batch_size, dtype=np.int64)
        epoch, place = np.zeros_like(sample), sample
        count = int(sample[-1]) + self.group
        if self.stream.folder.ended:
            count = len(self)
            epoch, place = sample // count, sample % count
        windows = np.empty_like(sample)
        group = place // self.group
        for turn, number in np.unique(np.stack([epoch, group]), axis=1).T.tolist():
            here = (epoch == turn) & (group == number)
            first = number * self.group
            key = (seed * 1_000_003 + turn) * 1_000_003 + number
            windows[here] = first + permuted(place[here] - first, min(self.group, count - first), key)
        return windows


def training_windows(folder: Path, manifest: Manifest, seq_len: int, pad_id: int, document_positions: bool) -> Windows:
    """The windows of the split "train", of a stream or of any other corpus. Raises UserError."""
    if manifest.stream is None:
        return Windows(TokenStream(folder, manifest, "train"), seq_len, pad_id, document_positions)
    return StreamedWindows(GrowingStream(StreamFolder(folder)), seq_len, pad_id, document_positions)
