"""Reads JSON lines for fine-tuning: every row is a chat or a prompt with its completion. A wrong row is an error.

{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
{"prompt": "...", "completion": "..."}          (or lists of messages in place of both strings)
"""

import json
import lzma
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.data.compression import UnreadableFile
from titan_moe.data.formats import LARGEST_ROW, opened_text
from titan_moe.errors import UserError

KINDS = {"chat": ("messages",), "completion": ("prompt", "completion")}
Row = dict[str, Any]


class Rows(NamedTuple):
    """The rows of some files, all of one kind."""

    kind: str
    """"chat" or "completion"."""
    rows: list[Row]

    @property
    def conversational(self) -> bool:
        """Whether prompts and completions are messages, and so need a chat template."""
        return self.kind == "chat" or isinstance(self.rows[0]["prompt"], list)


def read_rows(paths: Sequence[str], key: str) -> Rows:
    """The rows of JSON lines files, compressed or not. key: the option that names the files. Raises UserError."""
    first: tuple[str, bool] | None = None
    rows: list[Row] = []
    for path in paths:
        before = len(rows)
        for number, line in lines_of(Path(path), key):
            where = f"{key} = {path!r}: line {number}"
            row, kind = checked(line, where)
            found = Rows(kind, [row])
            if first is None:
                first = (kind, found.conversational)
            if (kind, found.conversational) != first:
                raise UserError(f"{where}: is of another kind than the rows before it; all rows must be of one kind")
            rows.append(row)
        if len(rows) == before:
            raise UserError(f"{key} = {path!r}: has no row")
    assert first is not None  # there is at least one file
    return Rows(first[0], rows)


def lines_of(path: Path, key: str) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers from 1. Raises UserError."""
    where = f"{key} = {str(path)!r}"
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise UserError(f"{where}: is no file; name files of JSON lines")
    lines = []
    try:
        with opened_text(path) as stream:
            number = 0
            while line := stream.readline(LARGEST_ROW + 1):
                number += 1
                if len(line) > LARGEST_ROW:
                    raise UserError(f"{where}: line {number}: has more than {LARGEST_ROW:,} bytes")
                if line.strip():
                    lines.append((number, line if isinstance(line, str) else line.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text: byte {error.start} of line {number + 1}") from error
    except (UnreadableFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{where}: can't be read: {error or type(error).__name__}") from error
    except OSError as error:
        raise UserError(f"{where}: can't be read: {error.strerror or error}") from error
    return lines


def checked(line: str, where: str) -> tuple[Row, str]:
    """A row without its other keys, and its kind. Raises UserError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: is no object with "messages", or "prompt" and "completion"')
    kind = next((kind for kind, keys in KINDS.items() if all(key in row for key in keys)), None)
    if kind is None:
        has = ", ".join(repr(str(key)[:40]) for key in [*row][:8]) or "nothing"
        raise UserError(f'{where}: must have "messages", or "prompt" and "completion"; it has {has}')
    values = {key: row[key] for key in KINDS[kind]}
    for key, value in values.items():
        if kind == "chat" or isinstance(value, list):
            check_messages(value, f"{where}: {key}")
        elif not isinstance(value, str):
            raise UserError(f"{where}: {key}: must be a string or a list of messages")
    if len({type(value) for value in values.values()}) > 1:
        raise UserError(f"{where}: prompt and completion must both be strings or both be lists of messages")
    if kind == "chat":
        if not any(message["role"] == "assistant" for message in values["messages"]):
            raise UserError(f"{where}: messages: has none of the role 'assistant', so there is nothing to learn")
    elif not values["completion"]:
        raise UserError(f"{where}: completion: is empty, so there is nothing to learn")
    return values, kind


def check_messages(messages: Any, where: str) -> None:
    """Raises UserError unless the value is a list of messages with a role and text."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: must be a list of messages that is not empty")
    for number, message in enumerate(messages):
        given = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not given or set(message) != {"role", "content"}:
            raise UserError(f'{where}: message {number} must have "role" and "content", both strings, and nothing else')


def split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows | None]:
    """Rows to train on and rows for validation, drawn by the seed; None without a fraction. Raises UserError."""
    if not fraction:
        return rows, None
    count = round(len(rows.rows) * fraction)
    if not 0 < count < len(rows.rows):
        raise UserError(
            f"data.validation_fraction = {fraction}: leaves {count} of {len(rows.rows)} rows for validation; give another "
            "fraction, or files with data.validation"
        )
    chosen = set(random.Random(seed).sample(range(len(rows.rows)), count))
    parts = ([row for n, row in enumerate(rows.rows) if (n in chosen) is kept] for kept in (False, True))
    training, validation = (Rows(rows.kind, part) for part in parts)
    return training, validation
