"""A checkpoint's state.json: everything but the tensors. Read through a schema, since it may be damaged or a stranger's."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from titan_moe.config.tables import Config, Model
from titan_moe.errors import UserError
from titan_moe.runtime.json_file import first_mistake, read_json, read_object

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


def read_state(checkpoint: Path, origin: str) -> State:
    """A checkpoint's state.json. Raises UserError for what is none, can't be read, is damaged, or is of another version."""
    path = checkpoint / STATE_FILE

    def parse(raw: Any) -> State:
        version = raw["format_version"] if isinstance(raw, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise UserError(f"{origin}: {checkpoint} has format version {version}; this program reads {FORMAT_VERSION}")
        return State.model_validate(raw)

    return read_object(
        path,
        parse,
        missing=UserError(f"{origin}: {checkpoint} is not a checkpoint (it has no {STATE_FILE})"),
        unreadable=lambda what: UserError(f"{origin}: {what}"),
        invalid=lambda what: UserError(f"{origin}: {path} is damaged: {what}"),
    )


def format_version(checkpoint: Path) -> int | None:
    """The format version of a checkpoint that may be damaged; None when it can't be read."""
    try:
        version = read_json(checkpoint / STATE_FILE)["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None


def dump(config: Config) -> dict[str, Any]:
    """A configuration as state.json keeps it."""
    return config.model_dump(mode="json")
