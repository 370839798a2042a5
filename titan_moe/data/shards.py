"""Token shards on disk: flat arrays of token ids, read through memory maps, with a manifest of their checksums.

A split ("train" or "validation") is a list of shard files of consecutive tokens. Every document is `bos ids... eos`. The
manifest holds sizes and SHA-256 sums. It is written last, so a directory with a manifest is complete.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from titan_moe.data.digests import read_checked, sha256, write_checked
from titan_moe.errors import UserError

FORMAT_VERSION = 3
SHARD_TOKENS = 1 << 26
SPLITS = ("train", "validation")

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class Shard:
    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    shards: list[Shard]
    tokens: int
    documents: int
    source_bytes: int
    documents_sha256: str
    """SHA-256 of the file that holds each document's start and domain."""


@dataclass(frozen=True)
class Manifest:
    version: int
    corpus: str
    tokenizer: str
    """SHA-256 of the tokenizer's model file."""
    dtype: str
    domains: list[str]
    splits: dict[str, Split]
    fingerprint: str
    """SHA-256 over the checksums of all shards. It identifies the data set."""
    report: list[str] = field(default_factory=list)
    """What was read and what was left out, a line each."""
    stream: dict[str, Any] | None = None
    """The definition of a stream, whose training split is not listed here (`streams.py`); None: all splits are."""


class DamagedShards(UserError):
    """A file of the shards is missing, truncated or altered. what: which file, and why."""

    def __init__(self, what: str, folder: Path) -> None:
        self.what = what
        super().__init__(f"{what}; delete {folder} to prepare it again")


class ShardWriter:
    """Writes the documents of one split as shards of SHARD_TOKENS ids, and a file of document starts and domains."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.folder, self.split, self.dtype = folder, split, np.dtype(dtype)
        self.pending: list[Tokens] = []
        self.pending_tokens = self.tokens = self.documents = self.source_bytes = 0
        self.starts: list[int] = []
        self.domains: list[int] = []
        self.shards: list[Shard] = []

    def add(self, ids: Tokens, domain: int, source_bytes: int) -> None:
        self.starts.append(self.tokens)
        self.domains.append(domain)
        self.pending.append(ids.astype(self.dtype))
        self.pending_tokens += len(ids)
        self.tokens += len(ids)
        self.documents += 1
        self.source_bytes += source_bytes
        while self.pending_tokens >= SHARD_TOKENS:
            self._write(SHARD_TOKENS)

    def _write(self, count: int) -> None:
        """Writes the first `count` pending tokens as a shard."""
        pending = np.concatenate(self.pending)
        shard, rest = pending[:count].tobytes(), pending[count:]
        self.pending, self.pending_tokens = [rest], len(rest)
        name = f"{self.split}-{len(self.shards):05d}.bin"
        (self.folder / name).write_bytes(shard)
        self.shards.append(Shard(name, count, hashlib.sha256(shard).hexdigest()))

    def finish(self) -> Split:
        if self.pending_tokens:
            self._write(self.pending_tokens)
        starts = np.array([self.starts, self.domains], dtype=np.int64)
        path = self.folder / f"{self.split}-documents.npy"
        np.save(path, starts)
        return Split(self.shards, self.tokens, self.documents, self.source_bytes, sha256(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    body = asdict(manifest)
    if manifest.stream is None:
        del body["stream"]  # as earlier versions write and read it
    write_checked(folder / "manifest.json", body)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a directory, whose files have the sizes that it says; `TokenStream` compares their checksums.

    Raises DamagedShards; OSError when a file can't be read now.
    """
    path = folder / "manifest.json"
    try:
        body = read_checked(path)
        if body["version"] != FORMAT_VERSION:
            raise DamagedShards(f"{path}: version {body['version']}, not {FORMAT_VERSION}", folder)
        splits = {
            name: Split(**(split | {"shards": [Shard(**shard) for shard in split["shards"]]}))
            for name, split in body["splits"].items()
        }
        manifest = Manifest(**(body | {"splits": splits}))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShards(f"{path}: damaged ({error})", folder) from error
    for split in splits.values():
        for shard in split.shards:
            check_file_size(folder, shard.file, shard.tokens * np.dtype(manifest.dtype).itemsize)
    for name, split in splits.items():
        check_file_size(folder, f"{name}-documents.npy", 128 + 16 * split.documents)
    return manifest


def check_file_size(folder: Path, name: str, size: int) -> None:
    try:
        actual = (folder / name).stat().st_size
    except FileNotFoundError as error:
        raise DamagedShards(f"{folder / name}: missing", folder) from error
    if actual != size:
        raise DamagedShards(f"{folder / name}: damaged ({actual:,} bytes, not {size:,})", folder)


class Maps(Protocol):
    """The memory maps of a split's shards, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tokens: ...


class TokenStream:
    """The tokens of one split as one long memory-mapped array."""

    maps: Maps

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        """Compares every file with its checksum. Raises UserError for a damaged or missing one."""
        self.split = manifest.splits[split]
        with ThreadPoolExecutor() as pool:
            sums = {shard.file: shard.sha256 for shard in self.split.shards}
            sums[f"{split}-documents.npy"] = self.split.documents_sha256
            list(pool.map(lambda file: verify(folder / file, sums[file], folder), sums))
        dtype = np.dtype(manifest.dtype)
        self.maps = [np.memmap(folder / shard.file, dtype=dtype, mode="r") for shard in self.split.shards]
        self.ends = np.cumsum([shard.tokens for shard in self.split.shards])
        self.starts, self.domains = np.load(folder / f"{split}-documents.npy", allow_pickle=False)

    def __len__(self) -> int:
        return self.split.tokens

    def read(self, start: int, end: int) -> Tokens:
        """Tokens [start, end) as int64, also across shards. Stops at the end of the stream."""
        parts: list[Tokens] = []
        first = int(np.searchsorted(self.ends, start, side="right"))
        for index in range(first, len(self.maps)):
            offset = int(self.ends[index]) - len(self.maps[index])
            if offset >= end:
                break
            parts.append(np.asarray(self.maps[index][max(start - offset, 0) : end - offset], dtype=np.int64))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def rows(self, starts: npt.NDArray[np.int64], length: int, fill: int) -> npt.NDArray[np.int64]:
        """(B, length) tokens from each of the (B,) positions `starts` on; `fill` past the end of the stream."""
        ids = np.full((len(starts), length), fill, dtype=np.int64)
        shard = np.searchsorted(self.ends, starts, side="right")
        crosses = starts + length > self.ends[shard]
        for index in np.unique(shard[~crosses]):
            rows = np.flatnonzero(~crosses & (shard == index))
            offset = self.ends[index] - len(self.maps[int(index)])
            ids[rows] = sliding_window_view(self.maps[int(index)], length)[starts[rows] - offset]
        for row in np.flatnonzero(crosses):
            part = self.read(int(starts[row]), int(starts[row]) + length)
            ids[row, : len(part)] = part
        return ids

    def documents_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Index of the document that the token at each position belongs to."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def starts_of(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Position of the first token of each document; any position for the index -1."""
        starts: npt.NDArray[np.int64] = self.starts[documents]
        return starts


def verify(path: Path, wanted: str, folder: Path) -> None:
    """Raises DamagedShards for a file that is missing, truncated or altered, UserError for one that can't be read now."""
    try:
        actual = sha256(path)
    except FileNotFoundError as error:
        raise DamagedShards(f"{path}: missing", folder) from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    if actual != wanted:
        raise DamagedShards(f"{path}: damaged (its checksum differs)", folder)
