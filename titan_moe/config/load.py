"""Builds a checked `Config` from TOML files and command-line overrides.

`extends = "base.toml"` (or a list) at the top of a file merges tables key by key; later files win, and the command line
wins over files. Every error is one line that names the source of the value, its key, and a valid choice.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import tomli
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from titan_moe.config import trust as trusted
from titan_moe.config.checks import check_config
from titan_moe.config.extensions import load_modules
from titan_moe.config.tables import Config, config_class, expand_user
from titan_moe.errors import UserError
from titan_moe.runtime.files import read_file
from titan_moe.runtime.json_file import mistake_in

Model = TypeVar("Model", bound=BaseModel)
CONFIG_DIR = Path(__file__).resolve().parent.parent.parent / "train_configs"
COMMAND_LINE = "command line"
CONFIG_BYTES = 16 << 20
MODULES = "extensions.modules"
FINETUNE = "finetune_"
"""The files of `train_configs/` whose names begin so are configurations of `titan-moe finetune`, with tables of their own."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def load_config(
    name: str | None = "debug",
    overrides: Sequence[str] = (),
    *,
    world_size: int = 1,
    settings: Sequence[tuple[str, dict[str, Any]]] = (),
    trust: bool = False,
    reads_files: bool = True,
) -> Config:
    """Reads, merges and checks a configuration.

    name: a file of `train_configs/` with or without `.toml`, or a path; None: no file. settings: (source, table) pairs
    that win over the file, later over earlier. overrides: `--section.key=value` words, which win over all. world_size:
    the number of processes that the parallelism degrees must fit. trust: import modules that files name, and read files that
    a run's stored config.toml names. reads_files: whether the verb reads such files. Raises UserError.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    path = Path("defaults") if name is None else find_config(name)
    if name is not None:
        merge_file(values, origins, path)
        if trusted.is_stored(path):
            trust = trust or trusted.is_own(values)
            # The run directory may have been moved: it is where its config.toml is.
            folder = path.absolute().parent
            set_value(values, "job.output_dir", str(folder.parent))
            set_value(values, "job.name", folder.name)
            if reads_files and not trust:
                trusted.check_files(values, [key for key, _ in parse_overrides(overrides)], str(path))
    for source, table in settings:
        merge(values, origins, table, source)
    pairs = parse_overrides(overrides)
    for key, raw in pairs:
        if key == MODULES:  # before the other overrides: the terms that the modules register have options too
            set_value(values, key, override_value(key, raw))
            origins[key] = COMMAND_LINE
    extensions = values.get("extensions")
    modules = extensions.get("modules") if isinstance(extensions, dict) else None
    if isinstance(modules, list) and all(isinstance(module, str) for module in modules):  # else `build` raises
        origin = f"{origins.get(MODULES, path)}: {MODULES}"
        if origins.get(MODULES) != COMMAND_LINE and not trust:
            trusted.check_modules(modules, origin)
        load_modules([user_path(module, origin) for module in modules], origin)
    for key, raw in pairs:
        set_value(values, key, override_value(key, raw))
        origins[key] = COMMAND_LINE
    check_values(values, lambda key: origins.get(key, str(path)))
    config = build(values, origins, default_origin=str(path))
    if not config.job.name:
        config = config.model_copy(update={"job": config.job.model_copy(update={"name": path.stem})})
    check_config(config, lambda key: f"{origins.get(key, path)}: {key}", world_size)
    return config


def saved_config(
    values: dict[str, Any],
    origin: str,
    overrides: Sequence[str],
    *,
    world_size: int,
    reset: Sequence[str] = (),
    trust: bool = False,
) -> Config:
    """The configuration stored in a checkpoint (origin), overridden and checked. reset: tables to set to defaults.

    Without `trust`, keys that name files have their defaults, and modules are refused.
    """
    trust = trust or trusted.is_own(values)
    kept = {key: value for key, value in values.items() if key not in reset}
    if not trust:
        kept = trusted.without_files(kept, [key for key, _ in parse_overrides(overrides)])
    return load_config(None, overrides, world_size=world_size, settings=[(origin, kept)], trust=trust)


def find_config(name: str, finetune: bool = False) -> Path:
    """The file that `name` means: a path, or a file of `train_configs/` with or without `.toml`. Raises UserError.

    finetune: whether `titan-moe finetune` asks, for the names that an error suggests."""
    candidates = [Path(user_path(name, "--config")), CONFIG_DIR / name, CONFIG_DIR / f"{name}.toml"]
    for candidate in candidates:
        if is_file(candidate):
            return candidate
    known = sorted(p.stem for p in CONFIG_DIR.glob("*.toml") if p.stem.startswith(FINETUNE) == finetune)
    near = nearest(Path(name).stem, known)
    hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}, or give a path"
    raise UserError(f"--config: no configuration {name!r}: {hint}")


def user_path(path: str, origin: str) -> str:
    """`expand_user`, with a UserError that names where the path is written."""
    try:
        return expand_user(path)
    except ValueError as error:
        raise UserError(f"{origin}: {path!r}: {error}") from error


def is_file(path: Path) -> bool:
    """Whether a file has this path; False for a text that no path can be, such as one of a thousand letters."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def merge_file(values: dict[str, Any], origins: dict[str, str], path: Path, seen: tuple[Path, ...] = ()) -> None:
    """Merges the files that a file extends, in order, and then its own values. Raises UserError.

    origins: receives the source file of each dotted key. seen: the files that extend this one.
    """
    if path.resolve() in seen:
        raise UserError(f"{path}: extends: the files extend each other in a circle")
    try:
        own = tomli.loads(read_file(path.resolve(), CONFIG_BYTES).decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}{spelling_hint(path, error)}") from error
    bases = own.pop("extends", [])
    for table, inner in own.items():
        if isinstance(inner, dict) and "extends" in inner:
            raise UserError(f"{path}: [{table}] extends: must stand at the top of the file, before the first [table]")
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: extends: must be a path or a list of paths, relative to this file")
    for base in bases:
        # A file anywhere may extend a shipped one by its name.
        base_path = path.parent / user_path(base, f"{path}: extends")
        base_path = base_path if is_file(base_path) else CONFIG_DIR / base
        if not is_file(base_path):
            raise UserError(f"{path}: extends: no file {str(base_path)!r}")
        merge_file(values, origins, base_path, (*seen, path.resolve()))
    merge(values, origins, own, str(path))


def merge(
    values: dict[str, Any], origins: dict[str, str], table: dict[str, Any], origin: str, prefix: str = ""
) -> None:
    """Overwrites values by those of `table`, key by key inside tables, and records their origin by dotted key."""
    for key, value in table.items():
        origins[f"{prefix}{key}"] = origin
        if isinstance(value, dict):
            inner = values[key] = values[key] if isinstance(values.get(key), dict) else {}
            merge(inner, origins, value, origin, f"{prefix}{key}.")
        else:
            values[key] = value


def parse_overrides(words: Sequence[str], table: type[BaseModel] | None = None) -> list[tuple[str, str]]:
    """The (key, text) pairs of `--section.key=value` and `--section.key value` words; UserError for any other word.

    table: the class of the whole configuration; None: that of `titan-moe train`."""
    overrides, others = split_overrides(words)
    if others:
        raise unknown_word(others[0], all_keys(table))
    return [(key, raw) for key, _, raw in (word[2:].partition("=") for word in overrides)]


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits command-line words into overrides, each as one word `--section.key=value`, and all others, in order.

    An override is a long option with a dot in its name. Raises UserError where one has no value.
    """
    overrides, others, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or "." not in name:
            others.append(word)
        elif equals:
            overrides.append(word)
        elif not rest or rest[0].startswith("--"):
            raise UserError(f"{COMMAND_LINE}: {word} needs a value: {word}=...")
        else:
            overrides.append(f"{word}={rest.pop(0)}")
    return overrides, others


def unknown_word(word: str, valid: Sequence[str]) -> UserError:
    """The error for a command-line word that nothing reads. valid: names of options, without dashes."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        example = word if "=" in word and name in all_keys() else "section.key=value"
        return UserError(f"{COMMAND_LINE}: {word!r} is not an option; options look like --{example}")
    near = nearest(name.lstrip("-"), valid)
    return UserError(f"{COMMAND_LINE}: unknown option {name}{f'; did you mean --{near}?' if near else ''}")


def override_value(key: str, raw: str, table: type[BaseModel] | None = None) -> Any:
    """Converts the text of an override to its key's type: string keys keep the text, others are read as TOML.

    As people write them, `True`, `.5`, `1.e-4`, `1e3` for an integer, and `1, 2` for a list are taken too.
    """
    field = dict(fields(table)).get(key)
    kind, text = field.annotation if field else None, raw.strip()
    if kind is str:
        return raw
    if get_origin(kind) is list and not text.startswith("["):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return parts if kind == list[str] else [toml_value(part) for part in parts]
    if (kind is bool or bool in get_args(kind)) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float) and NUMBER.fullmatch(text):
        value = float(text)
        if kind is int and abs(value) < 2**53 and value.is_integer():
            return int(value)
        if kind is float:
            return value
    return toml_value(raw)


def toml_value(raw: str) -> Any:
    """The value of a TOML literal; other text as it is."""
    try:
        return tomli.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        return raw


def spelling_hint(path: Path, error: Exception) -> str:
    """How to write the value in the line of a TOML file that a parser's error names; empty where that is not clear."""
    line = re.search(r"at line (\d+)", str(error))
    if line is None:
        return ""
    key, _, value = path.read_text(encoding="utf-8").splitlines()[int(line.group(1)) - 1].partition("=")
    value = value.split("#")[0].strip()
    if value.lower() in ("true", "false"):
        return f"; write {key.strip()} = {value.lower()}"
    if NUMBER.fullmatch(value):
        return f"; write {key.strip()} = {float(value)!r}"
    if re.fullmatch(r"[^\W\d][\w./~-]*", value):
        return f'; text needs quotes: {key.strip()} = "{value}"'
    return ""


def check_values(values: dict[str, Any], origin: Callable[[str], str], prefix: str = "") -> None:
    """Raises UserError for a text that can't be written to config.toml or be part of a path, and for too large integers."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            check_values(value, origin, f"{key}.")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, int) and text.bit_length() > 63:
                raise UserError(f"{origin(key)}: {key} = {shortened(text)}: is too large, with more than 63 bits")
            if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
                raise UserError(
                    f"{origin(key)}: {key} = {shortened(text)}: contains a NUL or bytes that are not UTF-8 text"
                )


def shortened(value: Any) -> str:
    """A value as an error shows it, at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of nested tables. Raises UserError where a part of the key is not a table."""
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(f"{COMMAND_LINE}: --{key}: {table!r} is not a table")
    values[last] = value


def is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def fields(table: type[BaseModel] | None = None, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The dotted key of every table and option with its field: a table, then its options, then the tables inside it."""
    for name, field in sorted(
        (table or config_class()).model_fields.items(), key=lambda item: is_table(item[1].annotation)
    ):
        yield f"{prefix}{name}", field
        annotation: Any = field.annotation
        if is_table(annotation):
            yield from fields(annotation, f"{prefix}{name}.")


def all_keys(table: type[BaseModel] | None = None) -> list[str]:
    """The dotted keys of all options. table: as in `parse_overrides`."""
    return [key for key, field in fields(table) if not is_table(field.annotation)]


def nearest(name: str, valid: Sequence[str]) -> str | None:
    """The valid name closest to `name`, first by its last dotted part, then as a whole; None: none is similar."""

    def similarity(other: str) -> list[float]:
        pairs = ((name.rpartition(".")[2], other.rpartition(".")[2]), (name, other))
        return [difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs]

    best = max(valid, key=similarity)
    return best if max(similarity(best)) >= 0.6 else None


def build(values: dict[str, Any], origins: dict[str, str], default_origin: str) -> Config:
    """Validates the merged values; raises UserError for the first mistake."""
    return build_table(config_class(), values, origins, default_origin)


def build_table(
    table: type[Model], values: dict[str, Any], origins: dict[str, str], default_origin: str, verb: str = "train"
) -> Model:
    """The same for a configuration of any class. verb: whose `--help` lists its keys."""
    try:
        return table.model_validate(values)
    except ValidationError as error:
        key, wanted, kind, value = mistake_in(error)
    # Inside a list or a union pydantic's location is longer than the key: take its longest prefix that has an origin.
    parts = key.split(".") if key else []
    known = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in origins]
    below = next((name for name in origins if name.startswith(f"{key}.")), None)
    if not known and below is not None:  # an override of section.key adds no origin for the table `section`
        key, known = below, [below]
    origin = origins[known[0]] if known else default_origin
    if kind == "extra_forbidden":
        near = nearest(key, all_keys(table))
        hint = f"; did you mean {near}?" if near else f"; `titan-moe {verb} --help` lists the keys"
        if key.startswith("regularizers."):
            hint += "; a term of your own needs its module in extensions.modules"
        raise UserError(f"{origin}: unknown key {key}{hint}")
    inner = [name for name in all_keys(table) if name.startswith(f"{key}.")]
    if inner:
        wanted = f"{key} is a table; set a key in it: {', '.join(inner)}"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        wanted = f"{wanted}; write {int(value)}"
    raise UserError(f"{origin}: {key} = {shortened(value)}: {wanted}")


def world_size_from_environment() -> int:
    """The number of processes of this run: WORLD_SIZE, set by torchrun and run_train.sh, else 1. Raises UserError."""
    raw = os.environ.get("WORLD_SIZE") or "1"
    if not re.fullmatch("[0-9]{1,9}", raw.strip()) or int(raw) < 1:
        raise UserError(f"environment: WORLD_SIZE={raw!r} is not a positive number of processes")
    return int(raw)
