"""Files and folders that appear complete or not at all, on a file system that several machines may share.

They are made under a name of their own, `.NAME.MACHINE-PID-RANDOM`, flushed to disk, and renamed. A process number alone does
not identify their maker: containers and machines that share a cache have the same numbers.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

ABANDONED_SECONDS = 24 * 3600  # without a change, after which nobody works on a half-made file or folder any more
OWN_NAME = re.compile(r"\..+\.(?:(\w+)-)?(\d+)(?:-[0-9a-f]{8})?")  # earlier versions wrote `.NAME.PID`


@functools.cache
def machine() -> str:
    """Identifies this boot of this machine and this namespace of process numbers; "unknown" without a /proc that says so."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[
            :12
        ]
    except OSError:
        return "unknown"


def fresh_path(path: Path) -> Path:
    """A name beside `path` that no other process uses, on any machine. Call `touch` on a folder while you work on it."""
    return path.with_name(f".{path.name}.{machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def touch(path: Path) -> None:
    """Shows other machines that `path` is still being worked on."""
    os.utime(path)


def is_abandoned(path: Path) -> bool:
    """Whether the maker of a path named by `fresh_path` is gone: its process has ended, or nothing has changed for a day."""
    match = OWN_NAME.fullmatch(path.name)
    if match is None:
        return False
    if match.group(1) == machine() != "unknown" and not process_lives(int(match.group(2))):
        return True
    try:
        changed = max(one.lstat().st_mtime for one in (path, *(path.iterdir() if path.is_dir() else ())))
    except FileNotFoundError:  # renamed or deleted meanwhile, so somebody is at work
        return False
    return time.time() - changed > ABANDONED_SECONDS


def process_lives(pid: int) -> bool:
    """Whether a process of this namespace exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove_abandoned(parent: Path) -> None:
    """Deletes what killed processes left half-made in a folder."""
    for path in parent.glob(".*"):
        if is_abandoned(path):
            remove(path)


def remove(path: Path) -> None:
    """Deletes a file or folder; no error if another process deletes it at the same time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Writes a file, or the entries of a folder, to disk, so that a rename after it can't become visible before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name of a new file, which replaces the file `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = fresh_path(path)
    try:
        yield fresh
        flush(fresh)
        fresh.replace(path)
        flush(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder, which becomes the folder `path` when the block ends without an error.

    If another process has made `path` meanwhile, that one stays. Deletes what killed processes left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    fresh = fresh_path(path)
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.iterdir():
            flush(file)
        flush(fresh)
        try:
            fresh.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        flush(path.parent)
    finally:
        remove(fresh)
