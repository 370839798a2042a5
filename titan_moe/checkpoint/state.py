"""A checkpoint's state.json: everything but the tensors. Read through a schema, since it may be damaged or a stranger's."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from titan_moe.config.tables import Config, Model
from titan_moe.errors import UserError
from titan_moe.runtime.files import TEXT_BYTES, read_file

FORMAT_VERSION = 2
STATE_FILE = "state.json"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0, lt=1 << 63)]


class State(BaseModel):
    """The content of state.json. Fields with a default are absent in files that earlier versions wrote."""

    model_config = ConfigDict(strict=True, frozen=True, use_attribute_docstrings=True)

    format_version: int
    titan_moe: str = ""
    torch: str = ""
    step: Natural
    config: dict[str, dict[str, Any]]
    """The complete configuration: by table, its options."""
    data: str
    """Fingerprint of the token shards."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    scales: dict[str, Finite] | None
    """Scaling of terms with `match_lb`; None before the first step."""
    norms: list[Finite]
    """The latest gradient norms."""
    spikes_in_a_row: Natural = 0
    """Updates left out since the last one that was made."""
    skipped: Natural
    """Updates left out so far."""
    modules: dict[str, str] = {}
    """SHA-256 of the source of each of `extensions.modules`."""
    step_tokens: Natural = 0
    """Tokens of all ranks in a microbatch; 0: unknown."""
    imported: str = ""
    """The architecture that the weights were imported from; empty for a checkpoint of a run."""

    def model_table(self, origin: str) -> dict[str, Any]:
        """The table [model], options that it lacks with their defaults. Raises UserError."""
        try:
            return Model.model_validate(self.config.get("model", {})).model_dump(mode="json")
        except ValidationError as error:
            raise UserError(f"{origin}: {STATE_FILE}: model.{first_mistake(error)}") from error


def read_json(path: Path, limit: int = TEXT_BYTES) -> Any:
    """The content of a JSON file. Raises OSError when it can't be read, and ValueError when it is not JSON."""
    try:
        return json.loads(read_file(path, limit).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("too many brackets inside each other") from error


def read_state(checkpoint: Path, origin: str) -> State:
    """A checkpoint's state.json. Raises UserError for what is none, can't be read, is damaged, or is of another version."""
    path = checkpoint / STATE_FILE
    try:
        raw = read_json(path)
        version = raw["format_version"] if isinstance(raw, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise UserError(f"{origin}: {checkpoint} has format version {version}; this program reads {FORMAT_VERSION}")
        return State.model_validate(raw)
    except FileNotFoundError:
        raise UserError(f"{origin}: {checkpoint} is not a checkpoint (it has no {STATE_FILE})") from None
    except OSError as error:
        raise UserError(f"{origin}: {path}: can't be read: {error.strerror}") from error
    except ValidationError as error:
        raise UserError(f"{origin}: {path} is damaged: {first_mistake(error)}") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{origin}: {path} is damaged: {one_line(error)}") from error


def format_version(checkpoint: Path) -> int | None:
    """The format version of a checkpoint that may be damaged; None when it can't be read."""
    try:
        version = read_json(checkpoint / STATE_FILE)["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None


def first_mistake(error: ValidationError) -> str:
    """The first thing that does not fit a schema, in one line: where, and what is wanted."""
    mistake = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in mistake["loc"])
    return f"{where or 'all of it'}: {mistake['msg'][0].lower() + mistake['msg'][1:]}"


def one_line(error: Exception) -> str:
    """What an error says, its type where the message alone says nothing, in one line."""
    text = f"no key {error}" if isinstance(error, KeyError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]


def dump(config: Config) -> dict[str, Any]:
    """A configuration as state.json keeps it."""
    return config.model_dump(mode="json")
