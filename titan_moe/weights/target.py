"""A new file or directory: written under another name beside it, then renamed, so that it is complete or absent."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from titan_moe.checkpoint.run_dir import fsync_file, fsync_folder
from titan_moe.errors import UserError
from titan_moe.runtime.files import refuse_link


def check_target(path: Path, is_folder: bool) -> None:
    """Raises UserError unless there is nothing at `path`, or an empty directory where a directory is to be written."""
    refuse_link(path)
    above = next(part for part in path.absolute().parents if part.exists())
    if not above.is_dir():
        raise UserError(f"--output = {str(path)!r}: {str(above)!r} is a file; name a path below a directory")
    if not path.exists() or (is_folder and path.is_dir() and not any(path.iterdir())):
        return
    if is_folder and path.is_dir():
        problem = "is a directory that is not empty; remove it or name another one"
    elif path.is_dir():
        problem = "is a directory; name a file in it"
    else:
        problem = "exists already; remove it or name another one"
    raise UserError(f"--output = {str(path)!r} {problem}")


@contextlib.contextmanager
def written_beside(path: Path, is_folder: bool) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the block. Nothing is left when the block fails.

    Raises UserError for a target that is taken, and when the disk is full or can't be written."""
    check_target(path, is_folder)
    target = Path(os.path.abspath(path))  # "." and ".." have no name
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_folder:
            temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*") if is_folder else [temporary]:
            if file.is_file():
                fsync_file(file)
        temporary.rename(target)
        fsync_folder(target.parent)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"--output = {str(path)!r}: can't be written: {error.strerror or error}") from error
        raise
