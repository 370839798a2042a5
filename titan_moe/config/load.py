"""From TOML files and command-line overrides to a checked `Config`.

`extends = "base.toml"` (or a list) at the top of a file merges tables key by key, later wins; the command line wins over
files. Every error is one line that names where the value came from, its key, and what would be right.
"""

import copy
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli
from pydantic import BaseModel, ValidationError

from titan_moe.config.checks import check_config
from titan_moe.config.extensions import load_modules
from titan_moe.config.tables import Config, config_class
from titan_moe.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parent.parent.parent / "train_configs"
COMMAND_LINE = "command line"


def load_config(
    name: str = "debug",
    overrides: Sequence[str] = (),
    *,
    world_size: int = 1,
    settings: Sequence[tuple[str, dict[str, Any]]] = (),
) -> Config:
    """Reads, merges and checks a configuration.

    name: a file of `train_configs/` with or without `.toml`, or a path. settings: tables that win over the file, later over
    earlier, each with where it stands. overrides: `--section.key=value` words, which win over all. world_size: processes that
    the layout must fit. Raises UserError.
    """
    path = find_config(name)
    values, origins = read_file(path)
    for where, table in settings:
        merge(values, copy.deepcopy(table))
        origins |= dict.fromkeys(dotted_keys(table), where)
    apply_overrides(values, origins, overrides, default_origin=str(path))
    config = build(values, origins, default_origin=str(path))
    if not config.job.name:
        config = config.model_copy(update={"job": config.job.model_copy(update={"name": path.stem})})
    check_config(config, lambda key: f"{origins.get(key, path)}: {key}", world_size)
    return config


def saved_config(
    values: dict[str, Any], origin: str, overrides: Sequence[str], *, world_size: int, reset: Sequence[str] = ()
) -> Config:
    """The configuration that a checkpoint keeps, checked, with overrides. reset: tables that go back to their defaults."""
    values = {key: value for key, value in copy.deepcopy(values).items() if key not in reset}
    origins: dict[str, str] = {}
    apply_overrides(values, origins, overrides, default_origin=origin)
    config = build(values, origins, default_origin=origin)
    check_config(config, lambda key: f"{origins.get(key, origin)}: {key}", world_size)
    return config


def apply_overrides(
    values: dict[str, Any], origins: dict[str, str], overrides: Sequence[str], default_origin: str
) -> None:
    """Sets the values that the command line gives. First imports the extension modules: their terms have options too."""
    pairs = list(parse_overrides(overrides))
    key = "extensions.modules"
    modules, origin = values.get("extensions", {}).get("modules", []), origins.get(key, default_origin)
    for name, raw in pairs:
        if name == key:
            modules, origin = override_value(key, raw), COMMAND_LINE
    if isinstance(modules, list) and all(
        isinstance(module, str) for module in modules
    ):  # else `build` says what is wrong
        load_modules(modules, f"{origin}: {key}")
    for name, raw in pairs:
        set_value(values, name, override_value(name, raw))
        origins[name] = COMMAND_LINE


def find_config(name: str) -> Path:
    candidates = [Path(name), CONFIG_DIR / name, CONFIG_DIR / f"{name}.toml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(p.stem for p in CONFIG_DIR.glob("*.toml"))
    near = difflib.get_close_matches(Path(name).stem, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}, or give a path"
    raise UserError(f"--config: no configuration {name!r}: {hint}")


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged values of a file and the files it extends, and for each dotted key the file it came from."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends: the files extend each other in a circle")
    try:
        own = tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    except (tomli.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    bases = own.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: extends: must be a path or a list of paths, relative to this file")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for base in bases:
        base_path = path.parent / base
        if not base_path.is_file():
            base_path = CONFIG_DIR / base  # so that a file anywhere can extend a shipped one
        if not base_path.is_file():
            raise UserError(f"{path}: extends: no file {str(base_path)!r}")
        base_values, base_origins = read_file(base_path, (*seen, path.resolve()))
        merge(values, base_values)
        origins |= base_origins
    merge(values, own)
    origins |= dict.fromkeys(dotted_keys(own), str(path))
    return values, origins


def merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def dotted_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--a.b=c` and `--a.b c` words as (key, text) pairs."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{COMMAND_LINE}: {word!r} is not an option; options look like --section.key=value")
        key, equals, raw = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{COMMAND_LINE}: {word} needs a value: {word}=...")
            raw = rest.pop(0)
        if "." not in key:
            near = nearest_key(key)
            raise UserError(f"{COMMAND_LINE}: unknown option --{key}{f'; did you mean --{near}?' if near else ''}")
        yield key, raw


def override_value(key: str, raw: str) -> Any:
    """The text of an override as the type its key has: text stays text for string keys, else it is read as TOML."""
    annotation = annotation_of(key)
    if annotation is str:
        return raw
    if annotation == list[str] and not raw.lstrip().startswith("["):
        return [part for part in raw.split(",") if part]
    try:
        return tomli.loads(f"value = {raw}")["value"]
    except tomli.TOMLDecodeError:
        return raw


def annotation_of(key: str) -> Any:
    table: Any = config_class()
    for part in key.split("."):
        if not (isinstance(table, type) and issubclass(table, BaseModel)) or part not in table.model_fields:
            return None
        table = table.model_fields[part].annotation
    return table


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(f"{COMMAND_LINE}: --{key}: {table!r} is not a table")
    values[last] = value


def all_keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a configuration may hold, tables left out."""
    for name, field in table.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from all_keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def nearest_key(key: str) -> str | None:
    """The valid key that `key` most resembles: one of the same name in another table, else as a whole or by its last part."""
    keys = list(all_keys(config_class()))
    namesakes = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    whole = difflib.get_close_matches(key, namesakes, 1, cutoff=0.0) or difflib.get_close_matches(
        key, keys, 1, cutoff=0.6
    )
    if whole:
        return whole[0]
    last = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    near = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, cutoff=0.6)
    return last[near[0]] if near else None


def build(values: dict[str, Any], origins: dict[str, str], default_origin: str) -> Config:
    """Validates the merged values; the first mistake becomes a UserError."""
    try:
        return config_class().model_validate(values)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
    parts = [str(part) for part in mistake["loc"] if not str(part).startswith(("list[", "str", "function-"))]
    # Inside a list or a union the location goes deeper than the key; name the key, the deepest that has an origin.
    key = ".".join(parts)
    known = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in origins]
    below = next((name for name in origins if name.startswith(f"{key}.")), None)
    if not known and below is not None:  # an override names no table on its way
        key, known = below, [below]
    origin = origins[known[0]] if known else default_origin
    if mistake["type"] == "extra_forbidden":
        near = nearest_key(key)
        hint = f"; did you mean {near}?" if near else "; `titan-moe train --help` lists the keys"
        if key.startswith("regularizers."):
            hint += "; a term of your own needs its module in extensions.modules"
        raise UserError(f"{origin}: unknown key {key}{hint}")
    value = mistake["input"]
    wanted = mistake["msg"][0].lower() + mistake["msg"][1:]
    raise UserError(f"{origin}: {key} = {value!r}: {wanted}")


def world_size_from_environment() -> int:
    """Processes of this run as torchrun (or run_train.sh's check) announces them."""
    raw = os.environ.get("WORLD_SIZE", "1")
    if not raw.isdigit() or int(raw) < 1:
        raise UserError(f"environment: WORLD_SIZE={raw!r} is not a positive number of processes")
    return int(raw)
