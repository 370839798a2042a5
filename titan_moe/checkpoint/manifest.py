"""A checkpoint's manifest: size and checksums of every file. Without one, or if they differ, nothing is loaded.

    {"step": 100, "files": {"state.json": {"size": 4711, "blocks": ["<sha256>", ...]}, ...}, "digest": "<sha256>"}

Checksums are per block of 16 MiB, so that threads and ranks can verify different blocks. Nothing here imports torch.
"""

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from titan_moe.errors import UserError
from titan_moe.runtime.cpus import cpus_of_rank, use_all_cpus
from titan_moe.runtime.json_file import read_object

MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 1 << 24
BUFFER_BYTES = 1 << 18


class Entry(NamedTuple):
    """Size and checksums of one file."""

    size: int
    blocks: list[str]
    """SHA-256 of every block, in hexadecimal."""


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    size: Annotated[int, Field(ge=0, lt=1 << 63)]
    blocks: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    step: Annotated[int, Field(ge=0, lt=1 << 63)]
    files: dict[Annotated[str, Field(pattern=r"^[^/\x00]{1,255}$")], _File]
    digest: str


class DamageError(Exception):
    """A file is missing, truncated or altered. The message is one line that names it."""


class UnreadableError(UserError):
    """A file can't be read now: no permission, a file server that does not answer. That says nothing about its content."""


def entry_of(path: Path) -> Entry:
    """The entry of a file, which is read completely."""
    size = path.stat().st_size
    with ThreadPoolExecutor(cpus_of_rank(), initializer=use_all_cpus) as pool:
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
    """Entries by file name. Raises DamageError, also when a file has another size, and UnreadableError."""
    path = folder / MANIFEST_FILE
    raw, manifest = read_object(
        path,
        lambda raw: (raw, _Manifest.model_validate(raw)),
        missing=DamageError(f"it has no {MANIFEST_FILE}, so it was never finished"),
        unreadable=UnreadableError,
        invalid=lambda what: DamageError(f"{MANIFEST_FILE} is altered ({what})"),
    )
    raw.pop("digest")
    if manifest.digest != body_digest(raw):
        raise DamageError(f"{MANIFEST_FILE} is altered")
    if folder.name.startswith("step-") and folder.name != f"step-{manifest.step:08d}":
        raise DamageError(f"{MANIFEST_FILE} belongs to step {manifest.step}")
    entries = {name: Entry(file.size, file.blocks) for name, file in manifest.files.items()}
    for name, entry in entries.items():
        try:
            facts = (folder / name).lstat()
        except FileNotFoundError as error:
            raise DamageError(f"{name}: {error.strerror}") from error
        except OSError as error:
            raise UnreadableError(f"{folder / name}: can't be read: {error.strerror}") from error
        if not stat.S_ISREG(facts.st_mode):
            raise UnreadableError(f"{folder / name}: is no regular file; a checkpoint is read from regular files only")
        if facts.st_size != entry.size:
            raise DamageError(f"{name} has {facts.st_size} bytes, not {entry.size}")
        if len(entry.blocks) != -(-entry.size // BLOCK_BYTES):
            raise DamageError(f"{MANIFEST_FILE} is altered: {name} has {len(entry.blocks)} checksums")
    return entries


def verify(folder: Path, entries: dict[str, Entry], part: int = 0, parts: int = 1) -> None:
    """Verifies the checksums of blocks part, part + parts, part + 2 parts and so on. Raises DamageError, UnreadableError."""
    blocks = [(name, n) for name, entry in sorted(entries.items()) for n in range(len(entry.blocks))]

    def check(name: str, number: int) -> None:
        try:
            digest = block_digest(folder / name, number * BLOCK_BYTES)
        except OSError as error:
            raise UnreadableError(f"{folder / name}: can't be read: {error.strerror}") from error
        if digest != entries[name].blocks[number]:
            raise DamageError(f"{name} is altered (checksum of block {number})")

    with ThreadPoolExecutor(cpus_of_rank(), initializer=use_all_cpus) as pool:
        list(pool.map(lambda block: check(*block), blocks[part::parts]))
