"""A lock that one process at a time holds, on one machine or several that share a file system.

The operating system's lock (flock) is released when the process dies. Where the file system has none (Lustre as it is
mounted by default), a second file is created exclusively, and its owner touches it every HEARTBEAT_SECONDS. A file that was
not touched for STALE_SECONDS belongs to a process that was killed, and is taken over.
"""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import IO

from titan_moe.runtime.files import open_append

NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 90.0

log = logging.getLogger("titan_moe")


class FileLock:
    """The lock that a path stands for. The file stays when the lock is released."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None
        self.owned: Path | None = None
        self.ended = threading.Event()

    def acquire(self) -> bool:
        """Takes the lock. Returns False when another process holds it. Raises OSError."""
        file = open_append(self.path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError as error:
            file.close()
            if error.errno not in NO_LOCKS:
                raise
            return self.acquire_without_flock()
        self.file = file
        return True

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.owned is not None:
            self.ended.set()
            self.owned.unlink(missing_ok=True)
            self.owned = None

    def acquire_without_flock(self) -> bool:
        owner = self.path.with_name(f"{self.path.name}-owner")
        log.warning(f"{self.path.parent}: this file system has no locks; {owner.name} marks who uses the directory")
        claim = self.path.with_name(f"{self.path.name}-{secrets.token_hex(8)}")
        claim.write_text(f"{socket.gethostname()} {os.getpid()}\n", encoding="utf-8")
        try:
            # The claim is new: its time is the file server's, so clocks of different machines are not compared.
            with contextlib.suppress(FileNotFoundError):
                if claim.stat().st_mtime - owner.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                    owner.unlink()
            os.link(claim, owner)  # fails if there is one: of several processes one succeeds
        except FileExistsError:
            return False
        finally:
            claim.unlink()
        self.owned = owner
        threading.Thread(target=self.touch, args=(owner,), daemon=True).start()
        return True

    def touch(self, owner: Path) -> None:
        while not self.ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # the file server may be away for a while
                os.utime(owner)


def wait_for(path: Path, seconds: float, poll: float) -> bool:
    """Waits until no process holds the lock of a path. Returns False if one still does after `seconds`."""
    end = time.monotonic() + seconds
    while path.exists():
        lock = FileLock(path)
        if lock.acquire():
            lock.release()
            return True
        if time.monotonic() > end:
            return False
        time.sleep(poll)
    return True
