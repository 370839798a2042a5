"""SHA-256 sums of files, and JSON files that carry their own sum.

An index in the cache keeps the sums of text files, so that a large corpus is read for them only once.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from titan_moe.runtime.owner import remove_abandoned, replacing

LARGE_BYTES = 1 << 30
SETTLED_NANOSECONDS = (
    2_000_000_000  # a file changed so recently may change again within one tick of a file system's clock
)

Identity = list[int]
"""Size, time of the last change of content and of any change (nanoseconds), inode number."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def digest(*parts: object) -> str:
    """A key of the cache: 20 hexadecimal digits that depend on all parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def write_checked(path: Path, body: dict[str, Any]) -> None:
    """Writes a dictionary as JSON, with its sum under "digest"."""
    path.write_text(json.dumps(body | {"digest": body_digest(body)}, indent=1))


def read_checked(path: Path) -> dict[str, Any]:
    """The dictionary of `write_checked`. Raises OSError; ValueError when it is not as it was written."""
    body = json.loads(path.read_bytes())
    if not isinstance(body, dict) or body.pop("digest", None) != body_digest(body):
        raise ValueError("its checksum differs")
    return body


def body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def identity(path: Path) -> Identity:
    """Differs after a change of the file, without reading it."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class FileDigests:
    """Identity and SHA-256 sum of each file, or the error that says why it can't be read.

    Only files that are not in the index of the cache are read.
    """

    def __init__(self, paths: Sequence[Path], roots: Sequence[Path], cache_dir: Path) -> None:
        """roots: what the user named, files or the folders that they are in. There is an index for each such list."""
        self.names = {path: os.path.abspath(path) for path in paths}
        key = hashlib.sha256(json.dumps([os.path.abspath(root) for root in roots]).encode()).hexdigest()[:20]
        self.index = cache_dir / "digests" / f"{key}.json"
        try:
            self.known: dict[str, list[Any]] = read_checked(self.index)["files"]
        except (OSError, ValueError, KeyError):  # missing or damaged: the sums can be computed again
            self.known = {}
        self.found: dict[Path, tuple[Identity, str] | OSError] = {}
        self.read_at = time.time_ns()
        unknown: list[Path] = []
        size = 0
        for path, name in self.names.items():
            try:
                now = identity(path)
            except OSError as error:
                self.found[path] = error
                continue
            before, digest = self.known.get(name, ([], ""))
            if now == before:
                self.found[path] = (now, digest)
            else:
                unknown.append(path)
                size += now[0]
        if size > LARGE_BYTES:
            print(f"Reading {size / 1e9:.1f} GB of text for its checksums (once)", file=sys.stderr)
        with ThreadPoolExecutor() as pool:
            self.found.update(zip(unknown, pool.map(identified, unknown), strict=True))

    def save(self) -> None:
        """Writes the index. Raises OSError."""
        settled = self.read_at - SETTLED_NANOSECONDS
        known = {
            self.names[path]: list(entry)
            for path, entry in self.found.items()
            if isinstance(entry, tuple) and max(entry[0][1:3]) < settled
        }
        if known != self.known:
            with replacing(self.index) as fresh:
                write_checked(fresh, {"files": known})
            remove_abandoned(self.index.parent)
            self.known = known


def identified(path: Path) -> tuple[Identity, str] | OSError:
    """A file's identity before it was read, and its sum."""
    try:
        return identity(path), sha256(path)
    except OSError as error:
        return error
