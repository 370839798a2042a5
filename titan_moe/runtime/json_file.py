"""JSON files that may be damaged or a stranger's, and what is wrong with them or with a configuration, in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from titan_moe.runtime.files import TEXT_BYTES, read_file

T = TypeVar("T")
# Parts of pydantic's location of a mistake that name a type and no key.
TYPES = re.compile(r"(list|dict|literal|function-[a-z]+)\[.*|str|bool|int|float", re.DOTALL)


def read_json(path: Path, limit: int = TEXT_BYTES) -> Any:
    """The content of a JSON file. Raises OSError when it can't be read, and ValueError when it is not JSON."""
    try:
        return json.loads(read_file(path, limit).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("too many brackets inside each other") from error


def read_object(
    path: Path,
    parse: Callable[[Any], T],
    missing: Exception,
    unreadable: Callable[[str], Exception],
    invalid: Callable[[str], Exception],
    limit: int = TEXT_BYTES,
) -> T:
    """What `parse` makes of the content of a JSON file.

    Raises `missing` when there is no such file, `unreadable(path and reason)` when it can't be read now, and
    `invalid(reason)` when it is not JSON or `parse` raises ValidationError, ValueError or KeyError. Other errors of
    `parse` pass."""
    try:
        return parse(read_json(path, limit))
    except FileNotFoundError:
        raise missing from None
    except OSError as error:
        raise unreadable(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise invalid(one_line(error)) from error


class Mistake(NamedTuple):
    """The first thing that does not fit a schema."""

    key: str
    """Dotted; empty: all of it."""
    wanted: str
    kind: str
    """pydantic's name for it."""
    value: Any


def mistake_in(error: ValidationError) -> Mistake:
    """The first mistake that a schema has found."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not TYPES.fullmatch(str(part)))
    wanted = first["msg"].removeprefix("Value error, ")
    return Mistake(key, wanted[0].lower() + wanted[1:], first["type"], first["input"])


def first_mistake(error: ValidationError) -> str:
    """The first thing that does not fit a schema, in one line: where, and what is wanted."""
    key, wanted, *_ = mistake_in(error)
    return f"{key or 'all of it'}: {wanted}"


def one_line(error: Exception) -> str:
    """What an error says, its type where the message alone says nothing, in one line."""
    if isinstance(error, ValidationError):
        return first_mistake(error)
    text = f"no key {error}" if isinstance(error, KeyError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]
