"""A checkpoint's manifest: size and checksums of every file. Without one, or if they differ, nothing is loaded.

    {"step": 100, "files": {"state.json": {"size": 4711, "blocks": ["<sha256>", ...]}, ...}, "digest": "<sha256>"}

Checksums are per block of 16 MiB, so that threads and ranks can verify different blocks. Nothing here imports torch.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 1 << 24
BUFFER_BYTES = 1 << 18


class Entry(NamedTuple):
    """Size and checksums of one file."""

    size: int
    blocks: list[str]
    """SHA-256 of every block, in hexadecimal."""


class DamageError(Exception):
    """A file is missing, truncated or altered. The message is one line that names it."""


def entry_of(path: Path) -> Entry:
    """The entry of a file, which is read completely."""
    size = path.stat().st_size
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blocks = list(pool.map(lambda start: block_digest(path, start), range(0, size, BLOCK_BYTES)))
    return Entry(size, blocks)


def block_digest(path: Path, start: int) -> str:
    """SHA-256 of the block at `start`. Reads through a small buffer: large short-lived ones fragment memory."""
    digest, buffer, remaining = hashlib.sha256(), bytearray(BUFFER_BYTES), BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while remaining and (count := file.readinto(memoryview(buffer)[: min(remaining, BUFFER_BYTES)])):
            digest.update(memoryview(buffer)[:count])
            remaining -= count
    return digest.hexdigest()


def write_manifest(folder: Path, step: int, entries: dict[str, Entry]) -> None:
    """Writes the manifest and syncs it to disk. It must be the last file of a checkpoint to be written."""
    body = {"step": step, "files": {name: entry._asdict() for name, entry in sorted(entries.items())}}
    with (folder / MANIFEST_FILE).open("w") as file:
        json.dump(body | {"digest": body_digest(body)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def body_digest(body: dict[str, Any]) -> str:
    """SHA-256 of the manifest itself, without its digest."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Entries by file name. Raises DamageError, also when a file has another size."""
    path = folder / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text())
        altered = raw.pop("digest") != body_digest(raw)
        entries = {name: Entry(int(file["size"]), list(file["blocks"])) for name, file in raw["files"].items()}
        step = int(raw["step"])
    except FileNotFoundError:
        raise DamageError(f"it has no {MANIFEST_FILE}, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamageError(f"{MANIFEST_FILE} can't be read ({type(error).__name__}: {error})") from error
    if altered:
        raise DamageError(f"{MANIFEST_FILE} is altered")
    if folder.name.startswith("step-") and folder.name != f"step-{step:08d}":
        raise DamageError(f"{MANIFEST_FILE} belongs to step {step}")
    for name, entry in entries.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DamageError(f"{name}: {error.strerror}") from error
        if size != entry.size:
            raise DamageError(f"{name} has {size} bytes, not {entry.size}")
    return entries


def verify(folder: Path, entries: dict[str, Entry], part: int = 0, parts: int = 1) -> None:
    """Verifies the checksums of blocks part, part + parts, part + 2 parts and so on. Raises DamageError."""
    blocks = [(name, n) for name, entry in sorted(entries.items()) for n in range(len(entry.blocks))]

    def check(name: str, number: int) -> None:
        try:
            digest = block_digest(folder / name, number * BLOCK_BYTES)
        except OSError as error:
            raise DamageError(f"{name}: {error.strerror}") from error
        if digest != entries[name].blocks[number]:
            raise DamageError(f"{name} is altered (checksum of block {number})")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda block: check(*block), blocks[part::parts]))
