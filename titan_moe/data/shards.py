"""Token shards on disk: flat arrays of ids that training reads by memory map, with a manifest that vouches for them.

A split ("train" or "validation") is a list of shard files of consecutive tokens. Every document is `bos ids... eos`. The
manifest holds sizes and SHA-256 sums and is written last, so a directory with a manifest is whole.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_moe.errors import UserError

FORMAT_VERSION = 2
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
    """Of the file of each document's start and domain."""


@dataclass(frozen=True)
class Manifest:
    version: int
    corpus: str
    tokenizer: str
    """SHA-256 of the tokenizer's model."""
    dtype: str
    domains: list[str]
    splits: dict[str, Split]
    fingerprint: str
    """SHA-256 over the shards' sums: the identity of the data set."""


class ShardWriter:
    """Collects documents of one split and writes shards of SHARD_TOKENS ids, and each document's start and domain."""

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
        everything = np.concatenate(self.pending)
        part, rest = everything[:count], everything[count:]
        self.pending, self.pending_tokens = [rest], len(rest)
        self._save(f"{self.split}-{len(self.shards):05d}.bin", part)

    def _save(self, name: str, values: Tokens) -> None:
        (self.folder / name).write_bytes(values.tobytes())
        self.shards.append(Shard(name, len(values), hashlib.sha256(values.tobytes()).hexdigest()))

    def finish(self) -> Split:
        if self.pending_tokens:
            self._write(self.pending_tokens)
        starts = np.array([self.starts, self.domains], dtype=np.int64)
        path = self.folder / f"{self.split}-documents.npy"
        np.save(path, starts)
        return Split(self.shards, self.tokens, self.documents, self.source_bytes, sha256(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1))


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError for a manifest that is damaged or of another version."""
    path = folder / "manifest.json"
    try:
        raw = json.loads(path.read_text())
        if raw["version"] != FORMAT_VERSION:
            raise UserError(f"{path}: version {raw['version']}, not {FORMAT_VERSION}; delete {folder} to make it again")
        splits = {
            name: Split(**(split | {"shards": [Shard(**shard) for shard in split["shards"]]}))
            for name, split in raw["splits"].items()
        }
        return Manifest(**(raw | {"splits": splits}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete {folder} to make it again") from error


class TokenStream:
    """The tokens of one split as one long array, by memory map."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        """Verifies every shard against its checksum. Raises UserError for a damaged or missing one."""
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
        """Tokens [start, end), across shards, as int64."""
        parts: list[Tokens] = []
        first = int(np.searchsorted(self.ends, start, side="right"))
        for index in range(first, len(self.maps)):
            offset = int(self.ends[index]) - len(self.maps[index])
            if offset >= end:
                break
            parts.append(np.asarray(self.maps[index][max(start - offset, 0) : end - offset], dtype=np.int64))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def documents_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Index of the document that each token position lies in."""
        return np.searchsorted(self.starts, positions, side="right") - 1


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, wanted: str, folder: Path) -> None:
    """Raises UserError for a file that is missing, cut short or altered."""
    try:
        found = sha256(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}; delete {folder} to make it again") from error
    if found != wanted:
        raise UserError(f"{path}: damaged (its checksum differs); delete {folder} to make it again")
