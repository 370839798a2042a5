"""A corpus of files: which files of a folder are read, and what identifies their text.

In a folder, hidden files and folders are left out, and links to folders are not followed; links to files are. The text is
identified by the files' content, format and domain, so that it is the same text wherever it lies.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from titan_moe.config.extensions import Document
from titan_moe.data.compression import UnreadableFile
from titan_moe.data.digests import FileDigests, Identity, identity
from titan_moe.data.formats import TextFile, format_by_name, read_file
from titan_moe.data.report import Report, printable
from titan_moe.errors import UserError


class Corpus(NamedTuple):
    name: str
    documents: Callable[[], Iterator[Document]]
    """Documents with text, in the same order every time; each call starts anew."""
    fingerprint: str
    """Changes when the text changes; part of the cache key."""
    report: Report
    """Of the latest pass over the documents; filled while iterating."""
    total_bytes: int | None = None
    """Size of the text for the progress bar; None when unknown."""
    save_digests: Callable[[], None] = lambda: None
    """Writes what identifies the text into the cache, so that the next start does not read all of it. Raises OSError."""


NO_PERMISSION = "{} can't be read: no permission"


class Found(NamedTuple):
    """Files to read below some roots, and what was left out, as (reason, name) pairs."""

    roots: list[Path]
    files: list[TextFile]
    left_out: list[tuple[str, str]]


def reported(
    name: str, raw: Callable[[Report], Iterator[Document]], fingerprint: str, text: "Text | None" = None
) -> Corpus:
    """A corpus of the documents of `raw(report)` that have text; iterating raises UserError when none has.

    text: the files that they come from, if they do.
    """
    report = Report()
    origin = text.origin if text else "data.corpus"

    def documents() -> Iterator[Document]:
        report.clear()
        yield from report.clean(raw(report))
        if not report.documents and report.left_out:
            raise UserError(f"{origin}: no text in {name}: {report.first_problem()}")

    if text is None:
        return Corpus(name, documents, fingerprint, report)
    return Corpus(name, documents, fingerprint, report, text.total_bytes(), text.digests.save)


class Text(NamedTuple):
    """The text of files, identified by their content."""

    files: list[tuple[TextFile, Identity]]
    left_out: list[tuple[str, str]]
    column: str
    origin: str
    fingerprint: str
    digests: FileDigests

    def read(self, report: Report) -> Iterator[Document]:
        """The documents of all files. Raises UserError when a file can't be read any more or has changed."""
        for reason, place in self.left_out:
            report.leave_out(reason, place)
        for file, before in self.files:
            try:
                yield from read_file(file, self.column, report)
                if identity(file.path) != before:
                    raise UserError(f"{self.origin}: {file.path}: changed while it was read; start again")
                report.files += 1
            except UnreadableFile as error:
                if file.named:
                    raise UserError(f"{self.origin}: {file.path}: {error}") from error
                report.leave_out(error.reason, f"{file.name}{f' ({error.details})' if error.details else ''}")
            except OSError as error:
                raise cannot_be_read(self.origin, file.path, error) from error

    def total_bytes(self) -> int | None:
        """Size of the text; None when files are compressed."""
        packed = (".gz", ".bz2", ".xz", ".zst", ".parquet")
        if any(file.path.name.lower().endswith(packed) for file, _ in self.files):
            return None
        return sum(before[0] for _, before in self.files)


def identified(found: Found, column: str, origin: str, cache_dir: Path) -> Text:
    """Files with their fingerprint. Those of a folder that the user may not read are left out.

    Raises UserError for a file that the user named and that can't be read, and for errors other than a lack of permission.
    """
    digests = FileDigests([file.path for file in found.files], found.roots, cache_dir)
    files: list[tuple[TextFile, Identity]] = []
    left_out = list(found.left_out)
    content: list[tuple[str, str, str]] = []
    for file in found.files:
        entry = digests.found[file.path]
        if isinstance(entry, tuple):
            files.append((file, entry[0]))
            content.append((format_by_name(file.path.name), printable(file.domain), entry[1]))
        elif isinstance(entry, PermissionError) and not file.named:
            left_out.append((NO_PERMISSION.format("file"), file.name))
        else:
            raise cannot_be_read(origin, file.path, entry)
    fingerprint = hashlib.sha256(json.dumps([column, content]).encode()).hexdigest()
    return Text(files, left_out, column, origin, fingerprint, digests)


def cannot_be_read(origin: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{origin}: {path}: can't be read: {error.strerror or error}")


def find_files(sources: Sequence[str], origin: str, corpora: Iterable[str]) -> Found:
    """Files and the files of folders, in the order of their paths. Raises UserError for a source that is neither.

    corpora: the names that could be given in place of a path, for the message about one that does not exist.
    """
    found = Found([], [], [])
    for source in sources:
        path = expanded(source, origin)
        found.roots.append(path)
        try:
            mode = mode_of(path)
        except OSError as error:
            raise cannot_be_read(origin, path, error) from error
        if mode is None:
            names = ", ".join(sorted(corpora))
            raise UserError(f"{origin} = {source!r}: neither a corpus ({names}) nor a file or folder")
        if stat.S_ISDIR(mode):
            found.files.extend(files_below(path, origin, found.left_out))
        elif stat.S_ISREG(mode):
            found.files.append(TextFile(path, path.name, path.name.split(".")[0], named=True))
        else:
            raise UserError(f"{origin}: {source!r} is neither a regular file nor a folder")
    if not found.files:
        left_out = f" ({len(found.left_out)} left out: {found.left_out[0][0]})" if found.left_out else ""
        raise UserError(f"{origin}: no file to read in {', '.join(sources)}{left_out}")
    return found


def files_below(root: Path, origin: str, left_out: list[tuple[str, str]]) -> list[TextFile]:
    """The regular files of a folder, at any depth, in the order of their paths."""
    paths: list[Path] = []

    def place(path: Path) -> str:
        return str(Path(root.name) / path.relative_to(root))

    def unreadable(error: OSError, what: str = "folder") -> None:
        path = Path(error.filename)
        if not isinstance(error, PermissionError) or path == root:
            raise cannot_be_read(origin, path, error)
        left_out.append((NO_PERMISSION.format(what), place(path)))

    for folder, folders, names in os.walk(root, onerror=unreadable):
        for path in (Path(folder, name) for name in sorted(folders)):
            if path.name.startswith("."):
                left_out.append(("folder is hidden", place(path)))
            elif path.is_symlink():
                left_out.append(("folder is a link", place(path)))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in sorted(names)):
            if path.name.startswith("."):
                left_out.append(("file is hidden", place(path)))
                continue
            try:
                mode = mode_of(path)
            except OSError as error:
                unreadable(error, "file")
                continue
            if mode is None:
                left_out.append(("link leads nowhere", place(path)))
            elif not stat.S_ISREG(mode):
                left_out.append(("not a regular file", place(path)))
            else:
                paths.append(path)
    return [TextFile(path, place(path), root.name) for path in sorted(paths)]


def mode_of(path: Path) -> int | None:
    """The type of what a path leads to; None if that does not exist. Raises OSError."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL character
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def expanded(path: str, origin: str) -> Path:
    """The path, with the user's home directory for a leading `~`. Raises UserError when that is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{origin} = {path!r}: {error}") from error
