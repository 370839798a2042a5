"""Compiles the C kernels and keeps the library in a directory that only this user can write.

    $TITAN_MOE_CACHE, or $XDG_CACHE_HOME/titan_moe, or ~/.cache/titan_moe
        kernels-UID/KEY-SHA256.so       KEY: sources, compiler, flags and processor; SHA256: of the file itself

Whoever can write the library runs code as this user, so owner, permissions and checksum are verified on the open file, and
that file is loaded, not its name. A file that fails is compiled again. Where there is no such directory (read-only, another
user's, a symbolic link) the library is compiled into a temporary one for this process alone.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = tuple(sorted(Path(__file__).with_name("csrc").glob("*.c")))
# PyTorch has loaded an OpenMP runtime already; the kernels use the same one and its threads.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 120
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger(__name__)


def load() -> ctypes.CDLL:
    """The library, from the cache or newly compiled. Raises OSError or SubprocessError, which say why there is none."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc"))), None)
    if compiler is None:
        raise OSError("no C compiler (gcc or cc) on PATH")
    parts = (*(source.read_text() for source in SOURCES), compiler, *FLAGS, _processor())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    try:
        folder = _private_folder()
        return _cached(folder, key) or _load(_compile(compiler, folder, key))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        log.warning(f"The losses' C kernels can't be kept, so this process compiles them for itself: {error}")
    with tempfile.TemporaryDirectory(prefix="titan-moe-kernels-") as temporary:
        return _load(_compile(compiler, Path(temporary), key))


def _private_folder() -> Path:
    """The directory of this user's libraries, made if needed. Raises OSError if other users could write to it."""
    root = os.environ.get("TITAN_MOE_CACHE")
    cache = Path(root).expanduser() if root else _user_cache() / "titan_moe"
    folder = cache / f"kernels-{os.getuid()}"
    cache.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{folder} is a symbolic link or no directory; remove it")
    if found.st_uid != os.getuid():
        raise OSError(f"{folder} belongs to user {found.st_uid}; remove it, or set TITAN_MOE_CACHE")
    if found.st_mode & OTHERS_WRITE:
        raise OSError(f"other users can write to {folder}; remove it")
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _cached(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library with this key; None when there is no intact one. Deletes damaged ones."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        try:
            return _load(path)
        except OSError as error:
            log.warning(f"{path}: {error}; compiled again")
            path.unlink(missing_ok=True)
    return None


def _load(path: Path) -> ctypes.CDLL:
    """Loads a library if it is this user's alone and has the checksum in its name. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & OTHERS_WRITE:
            raise OSError("other users own it or can write to it")
        if path.stem.rpartition("-")[2] != hashlib.sha256(file.read()).hexdigest():
            raise OSError("it is incomplete or altered")
        # Not /proc/self: dlopen takes a library that other code loaded by the same name for this one.
        return ctypes.CDLL(f"/proc/{os.getpid()}/fd/{handle}")


def _compile(compiler: str, folder: Path, key: str) -> Path:
    """Compiles into a new file of `folder`. Raises CompileError, or OSError when the folder can't be written."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may compile; all results are equal
        temporary = Path(scratch) / "kernels.so"
        command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        if done.returncode:
            raise CompileError(f"{' '.join(command)}: {done.stderr.strip()}")
        temporary.chmod(0o600)
        with temporary.open("rb") as file:
            path = folder / f"{key}-{hashlib.sha256(file.read()).hexdigest()}.so"
            os.fsync(file.fileno())
        os.replace(temporary, path)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return path


class CompileError(subprocess.SubprocessError):
    """The compiler failed; the message is its command and what it printed."""


def _processor() -> str:
    """What -march=native depends on: the architecture and its instruction set extensions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
