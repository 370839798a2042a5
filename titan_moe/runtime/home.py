"""Caches and a user name for a process without a home directory, such as a container that runs as some number."""

import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache: TITAN_MOE_CACHE, else titan_moe in XDG_CACHE_HOME or ~/.cache. RuntimeError: no home is known."""
    chosen = os.environ.get("TITAN_MOE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "titan_moe"


def provide_cache() -> None:
    """Sets XDG_CACHE_HOME where no home directory is known, and LOGNAME where no user name is; torch asks for both."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"
    if os.path.expanduser("~") != "~" or os.environ.get("XDG_CACHE_HOME"):
        return
    cache = Path(tempfile.gettempdir()) / f"titan_moe-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    found = cache.lstat()
    # Anyone can make a directory of this name, and put programs into it that would run as this user.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        cache = Path(tempfile.mkdtemp(prefix="titan_moe-"))
    os.environ["XDG_CACHE_HOME"] = str(cache)
    if (os.environ.get("RANK") or "0") == "0":
        print(f"No home directory is known: caches are in {cache}. Set HOME or XDG_CACHE_HOME.", file=sys.stderr)
