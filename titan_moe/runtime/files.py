"""Files of a run: what is read may come from a stranger, and what is written must not go elsewhere through a link.

Nothing here imports torch.
"""

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import IO

from titan_moe.errors import UserError

TEXT_BYTES = 64 << 20
"""The largest configuration, state, manifest or inspection that is read."""
METRICS_BYTES = 4 << 30
"""The largest metrics.jsonl that is read."""


def read_file(path: Path, limit: int = TEXT_BYTES) -> bytes:
    """The content of a regular file. Raises OSError, also for a symbolic link, for what is no regular file (a device or a
    FIFO would block or never end) and for more than `limit` bytes."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        if facts.st_size > limit:
            raise OSError(errno.EFBIG, f"More than {limit:,} bytes", str(path))
        return file.read(facts.st_size)


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file completely or not at all: under another name, then renamed, which replaces a link and does not follow it.

    Raises OSError."""
    raw = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(handle)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_append(path: Path) -> IO[str]:
    """Opens a text file to append to; it is created if there is none. Raises OSError, also for a symbolic link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return open(handle, "a", encoding="utf-8")


def own_folder(root: Path, *names: str) -> Path:
    """The directory root/NAMES, created if there is none. Raises UserError where a name below `root` is a symbolic link:
    a run directory from elsewhere must not choose where files are written."""
    path = root
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = path / name
        refuse_link(path)
        path.mkdir(exist_ok=True)
    return path


def refuse_link(path: Path) -> None:
    """Raises UserError for a symbolic link."""
    if path.is_symlink():
        raise UserError(
            f"{path}: is a symbolic link, and nothing is written through one; remove it, or put a directory there"
        )
