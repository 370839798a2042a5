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

SETTLED_SECONDS = 2  # a file changed so recently may change again within one tick of the file system's clock
LARGE_BYTES = 1 << 30

Identity = list[int]
"""Size, time of the last change of content and of any change (nanoseconds), inode number."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


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


def file_digests(paths: Sequence[Path], cache_dir: Path) -> dict[Path, tuple[Identity, str] | OSError]:
    """Identity and SHA-256 sum of each file, or why it can't be read."""
    names = {path: os.path.abspath(path) for path in paths}
    key = hashlib.sha256(json.dumps(sorted(names.values())).encode()).hexdigest()[:20]
    index = cache_dir / "digests" / f"{key}.json"
    try:
        known = read_checked(index)["files"]
    except (OSError, ValueError, KeyError):  # missing or damaged: it can be made again
        known = {}
    found: dict[Path, tuple[Identity, str] | OSError] = {}
    unknown: list[Path] = []
    for path, name in names.items():
        try:
            now = identity(path)
        except OSError as error:
            found[path] = error
            continue
        if name in known and known[name][0] == now:
            found[path] = (now, known[name][1])
        else:
            unknown.append(path)
            found[path] = (now, "")
    size = sum(entry[0][0] for path in unknown if isinstance(entry := found[path], tuple))
    if size > LARGE_BYTES:
        print(f"Reading {size / 1e9:.1f} GB of text for its checksums, once", file=sys.stderr)
    with ThreadPoolExecutor() as pool:
        found.update(zip(unknown, pool.map(identify, unknown), strict=True))
    settled = (time.time() - SETTLED_SECONDS) * 1e9
    keep = {
        names[path]: list(entry)
        for path, entry in found.items()
        if isinstance(entry, tuple) and max(entry[0][1:3]) < settled
    }
    if keep != known:
        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(index.parent)
            with replacing(index) as fresh:
                write_checked(fresh, {"files": keep})
        except OSError as error:
            print(
                f"Note: {index} can't be written ({error.strerror}); every start reads all text for its checksums",
                file=sys.stderr,
            )
    return found


def identify(path: Path) -> tuple[Identity, str] | OSError:
    """A file's identity before it was read, and its sum."""
    try:
        return identity(path), sha256(path)
    except OSError as error:
        return error
