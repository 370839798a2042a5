"""The documents of one file. Its name, in any case and without .gz, .bz2, .xz or .zst, tells the format:

    .parquet            Parquet: a document per row
    .jsonl .ndjson      JSON lines: a document per line
    .json               JSON lines, one array of objects, or one object
    .txt, other names   the file is one document; without .txt, JSON lines are recognised by the first line

A row that can't be used is left out and counted.
"""

import contextlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from titan_moe.config.extensions import Document
from titan_moe.data.compression import UnreadableFile, opened
from titan_moe.data.report import Report, printable
from titan_moe.errors import UserError, pip_install

# Limits on what one document may need in memory: a small compressed file can hold any amount of text.
LARGEST_ROW = 1 << 28  # bytes of a JSON row, or characters of a Parquet row's text
LARGEST_FILE = 1 << 32  # bytes of a file that is one document
LARGEST_UNPACKED = 1 << 30  # the same for what a compressed file holds, and for a JSON array

HEAD_BYTES = 8192
SNIFFED_ROWS = 5
PARQUET_ROWS = 128  # read at a time
BYTE_ORDER_MARKS = {  # the longer ones first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
NOT_JSON = "row is not JSON"
ARRAY_SIGN = re.compile(r'["\[\]{},]')
STRING_SIGN = re.compile(r'["\\]')


class TextFile(NamedTuple):
    """A regular file that text is read from."""

    path: Path
    name: str
    """How the report names it: relative to the folder of what the user named."""
    domain: str
    named: bool = False
    """The user named this very file, not a folder that it is in."""


class BadRow(NamedTuple):
    """A row without usable text."""

    reason: str
    details: str = ""


TOO_LONG = BadRow(f"row has more than {LARGEST_ROW:,} bytes")
Rows = Iterator[tuple[int, str | BadRow]]
"""Line or row numbers, counted from 1, and the rows' text."""


def format_by_name(name: str) -> str:
    """ "parquet", "lines" (JSON lines), "json", "text", or "" where the name does not tell."""
    formats = {".parquet": "parquet", ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".txt": "text"}
    return formats.get(Path(re.sub(r"(\.(gz|bz2|xz|zst))+$", "", name.lower())).suffix, "")


def read_file(file: TextFile, column: str, report: Report) -> Iterator[Document]:
    """The documents of a file. column: the key or column of a row that holds its text.

    Raises UnreadableFile for its content, OSError when it can't be read now, UserError when a package is missing.
    """
    try:
        with opened(file.path) as (stream, compressed):
            head = stream.read(HEAD_BYTES)
        name_says = format_by_name(file.path.name)
        if head.startswith(b"PAR1") or name_says == "parquet":
            if compressed:
                raise UnreadableFile("file is compressed Parquet; decompress it")
            yield from documents_of(parquet_rows(file.path, column), file, report)
        elif name_says in ("lines", "json"):
            rows = json_lines if name_says == "lines" else json_rows
            yield from documents_of(rows(file.path, column), file, report)
        elif name_says == "" and starts_with_row(file.path, head, column):
            yield from documents_of(json_lines(file.path, column), file, report)
        else:
            if starts_with_row(file.path, head, column):
                report.note(f"{file.name} holds JSON lines, but its name says text, and it is read as text")
            text = whole_text(file.path, head, compressed)
            if text:
                yield Document(text, file.domain)
            else:
                report.leave_out("file is empty", file.name)
    except (EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UnreadableFile("file is damaged from some point on", error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UnreadableFile("file is damaged from some point on", error) from error  # says a decompressor or pyarrow


def documents_of(rows: Rows, file: TextFile, report: Report) -> Iterator[Document]:
    """The documents of rows. Raises UnreadableFile at the end if no row could be used."""
    usable = number = 0
    bad: list[tuple[int, BadRow]] = []  # the first one of each reason
    for number, text in rows:
        report.rows += 1
        if isinstance(text, BadRow):
            report.leave_out(text.reason, f"{file.name}:{number}{f' ({text.details})' if text.details else ''}")
            if all(text.reason != other.reason for _, other in bad):
                bad.append((number, text))
            continue
        usable += 1
        if text:
            yield Document(text, file.domain)
        else:
            report.leave_out("row has an empty text", f"{file.name}:{number}")
    if not number:
        report.leave_out("file is empty", file.name)
    if bad and not usable:
        number, (reason, details) = bad[0]
        why = "file is not JSON" if reason == NOT_JSON and len(bad) == 1 else "file has no usable row"
        raise UnreadableFile(why, f"row {number}: {reason}{f': {details}' if details else ''}")


# --- text


def encoding_of(head: bytes) -> tuple[str, bytes]:
    """The encoding that a byte order mark at the start tells, and the mark; without one, UTF-8."""
    return next(((name, mark) for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), ("utf-8", b""))


@contextlib.contextmanager
def opened_text(path: Path) -> Iterator[IO[Any]]:
    """The content of a file after a byte order mark: as bytes if it is UTF-8, else decoded. Lines end with "\\n" only."""
    with opened(path) as (stream, _):
        encoding, mark = encoding_of(stream.read(4))
    with opened(path) as (stream, _):
        if encoding == "utf-8":
            stream.read(len(mark))
            yield stream
        else:
            yield io.TextIOWrapper(stream, encoding, newline="\n")


def whole_text(path: Path, head: bytes, compressed: bool) -> str:
    """The text of a file that is one document. head: its first HEAD_BYTES. Raises UnreadableFile."""
    encoding, mark = encoding_of(head)
    if head[257:262] == b"ustar":
        raise UnreadableFile("file is a tar archive; unpack it")
    if encoding == "utf-8" and b"\0" in head:
        raise UnreadableFile("file is not text (it has NUL bytes)")
    limit = LARGEST_UNPACKED if compressed else LARGEST_FILE
    with opened(path) as (stream, _):
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise UnreadableFile(f"file has more than {limit:,} bytes of text; cut it into smaller ones")
    try:
        text = raw[len(mark) :].decode() if encoding == "utf-8" else raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"file is not text (not {encoding.upper()})", f"byte {error.start:,}") from error
    if encoding != "utf-8" and "\0" in text[:HEAD_BYTES]:
        raise UnreadableFile("file is not text (it has NUL characters)")
    return text


# --- JSON


def starts_with_row(path: Path, head: bytes, column: str) -> bool:
    """Whether one of the first lines of a file is a JSON object with text. head: the start of the file."""
    if not head.decode(encoding_of(head)[0], "ignore").lstrip("\ufeff \t\r\n").startswith("{"):
        return False
    with opened_text(path) as stream:
        return any(isinstance(text_of(stream.readline(LARGEST_ROW), column), str) for _ in range(SNIFFED_ROWS))


def json_lines(path: Path, column: str) -> Rows:
    ends = (b"\n", "\n")
    with opened_text(path) as stream:
        number = 0
        while line := stream.readline(LARGEST_ROW + 1):
            number += 1
            if len(line) > LARGEST_ROW and line[-1:] not in ends:
                while line and line[-1:] not in ends:
                    line = stream.readline(1 << 20)
                yield number, TOO_LONG
            elif line.strip():
                yield number, text_of(line, column)


def json_rows(path: Path, column: str) -> Rows:
    """The rows of a .json file: the elements of one array, one object, or lines."""
    with opened_text(path) as stream:
        first = stream.readline(LARGEST_ROW)
        while first and not first.strip():
            first = stream.readline(LARGEST_ROW)
        is_array = first.lstrip()[:1] in (b"[", "[")
        is_lines = not is_array and isinstance(parsed(first), dict)
        whole = first if is_lines else first + stream.read(LARGEST_UNPACKED + 1)
    if is_lines or not (is_array or isinstance(parsed(whole), dict)):
        yield from json_lines(path, column)
    elif len(whole) > LARGEST_UNPACKED:
        raise UnreadableFile(f"file is one JSON value of more than {LARGEST_UNPACKED:,} bytes; make it JSON lines")
    elif is_array:
        text = whole if isinstance(whole, str) else whole.decode("utf-8", "surrogateescape")
        for number, element in enumerate(array_elements(text), 1):
            yield number, text_of(element.encode("utf-8", "surrogateescape"), column)
    else:
        yield 1, text_of(whole, column)


def array_elements(text: str) -> Iterator[str]:
    """The source of each element of a JSON array. Nothing is parsed, so a bad element does not spoil the others."""
    start = at = text.index("[") + 1
    depth = 0
    while sign := ARRAY_SIGN.search(text, at):
        at = sign.end()
        if sign.group() == '"':
            while (end := STRING_SIGN.search(text, at)) and end.group() == "\\":
                at = end.end() + 1
            at = end.end() if end else len(text)
        elif sign.group() in "[{":
            depth += 1
        elif depth and sign.group() in "]}":
            depth -= 1
        elif not depth and sign.group() in ",]":
            if sign.group() == "," or text[start : sign.start()].strip():
                yield text[start : sign.start()]
            start = at
            if sign.group() == "]":
                break
    if text[start:].strip():  # the array breaks off, or something follows it
        yield text[start:]


def text_of(source: bytes | str, column: str) -> str | BadRow:
    """The text of a JSON row."""
    row = parsed(source)
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict):
        return BadRow("row is not an object")
    if column not in row:
        return BadRow(f"row has no {column!r}", has_columns(list(row)))
    text = row[column]
    return text if isinstance(text, str) else BadRow(f"row has no string under {column!r}")


def parsed(source: bytes | str) -> Any:
    """The value of a JSON text, or a BadRow."""
    try:
        return json.loads(source if isinstance(source, str) else source.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("row is not UTF-8", f"byte {error.start:,}")
    except json.JSONDecodeError as error:
        return BadRow(NOT_JSON, error.args[0])
    except RecursionError:
        return BadRow("row is nested too deeply")
    except ValueError:
        return BadRow("row has a number of too many digits")


def has_columns(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:10])
    return f"it has {shown or 'nothing'}{', ...' if len(names) > 10 else ''}; data.text_column says which to use"


# --- Parquet


def parquet_rows(path: Path, column: str) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"data.corpus: {path}: Parquet files need pyarrow ({pip_install('pyarrow')})") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UnreadableFile(f"file has no column {column!r}", has_columns(names))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    number += 1
                    yield number, parquet_text(value, column)
    except pyarrow.ArrowException as error:
        raise UnreadableFile(
            "file is damaged from some point on" if number else "file is not Parquet", error
        ) from error


def parquet_text(value: Any, column: str) -> str | BadRow:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return BadRow("row is not UTF-8", f"byte {error.start:,}")
    if not isinstance(text, str):
        return BadRow(f"row has no string under {column!r}")
    return text if len(text) <= LARGEST_ROW else TOO_LONG
