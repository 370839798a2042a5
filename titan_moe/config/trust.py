"""What a stored configuration may not do without the user's word: run code, read files, say where to write.

A stored configuration is that of a checkpoint (state.json) or the config.toml of a run directory. It may have been made by
someone else. Code is asked for in every file: a module that a file names is imported only with `--trust`; one that the
command line names is imported without.

The user's own runs need no `--trust`: the cache remembers the digest of every configuration that a run wrote here.
"""

import contextlib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from titan_moe.config import extensions
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.runtime.home import cache_folder

BUILT_IN_CORPORA = ("stdlib", "wikitext2", "domains", "c4")
OWN_PACKAGES = ("titan_moe", "torchtitan_ext")
FILE_KEYS = (
    "data.corpus",
    "data.cache_dir",
    "tokenizer.path",
    "checkpoint.load_path",
    "checkpoint.upcycle_path",
    "checkpoint.expert_order",
    "eval.data",
)
"""Keys that name files or directories, other than the run directory itself and modules."""
RUN_FILES = ("checkpoints", "metrics.jsonl", "logs", ".lock")
"""Beside one of these a config.toml is a run's."""


def marker(values: Mapping[str, Any]) -> Path:
    """The file whose existence says that a run wrote this configuration here."""
    content = json.dumps(values, sort_keys=True, default=str)
    return cache_folder() / "configurations" / hashlib.sha256(content.encode()).hexdigest()


def remember(config: BaseModel) -> None:
    """Remembers a configuration as the user's own. Without a cache that can be written it is not remembered."""
    path = marker(config.model_dump(mode="json"))
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch()


def is_own(values: Mapping[str, Any]) -> bool:
    """Whether a run of this user wrote this configuration here, and nothing in it has changed."""
    return marker(values).is_file()


def check_modules(modules: Sequence[str], origin: str) -> None:
    """Raises UserError if there are modules beside those of titan_moe itself: the file that names them is not trusted."""
    modules = [name for name in modules if name.endswith(".py") or name.split(".")[0] not in OWN_PACKAGES]
    if modules:
        raise UserError(
            f"{origin} names {', '.join(map(repr, modules))}, and importing runs their code; if you trust them, give --trust, "
            f"or name them yourself: --extensions.modules={','.join(modules)}"
        )


def is_stored(path: Path) -> bool:
    """Whether a configuration file is the config.toml of a run directory."""
    return path.name == "config.toml" and any((path.parent / name).exists() for name in RUN_FILES)


def files_named(values: Mapping[str, Any], given: Collection[str], keys: Sequence[str] = FILE_KEYS) -> dict[str, Any]:
    """Those of `keys` that name a file, with their values. given: keys of the command line, which count as trusted."""
    named = {}
    for key in keys:
        table, _, option = key.partition(".")
        inside = values.get(table)
        value = inside.get(option) if isinstance(inside, Mapping) else None
        if value and key not in given and value not in BUILT_IN_CORPORA:
            named[key] = value
    return named


def check_files(
    values: Mapping[str, Any], given: Collection[str], origin: str, keys: Sequence[str] = FILE_KEYS
) -> None:
    """Raises UserError if a stored configuration names files. keys: those that could."""
    named = files_named(values, given, keys)
    if named:
        listed = ", ".join(f"{key} = {value!r}" for key, value in named.items())
        raise UserError(
            f"{origin} is a run's stored configuration and names files: {listed}; if you trust it, give --trust, or give "
            f"these keys yourself: --{next(iter(named))}=..."
        )


def without_files(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """A stored configuration without the keys that name files, which so have their defaults."""
    named = files_named(values, given)
    return {
        table: {option: value for option, value in inside.items() if f"{table}.{option}" not in named}
        if isinstance(inside, Mapping)
        else inside
        for table, inside in values.items()
    }


def with_absolute_paths(config: Config) -> Config:
    """The same configuration with absolute paths, so that it means the same in any working directory."""
    values: dict[str, dict[str, Any]] = {}
    for key in ("job.output_dir", "extensions.modules", *FILE_KEYS):
        table, _, option = key.partition(".")
        value = getattr(getattr(config, table), option)
        values.setdefault(table, {})[option] = [*map(absolute, value)] if isinstance(value, list) else absolute(value)
    tables = {name: getattr(config, name).model_copy(update=options) for name, options in values.items()}
    return config.model_copy(update=tables)


def absolute(name: str) -> str:
    """A path made absolute; names of corpora and of importable modules, and the empty string, are left as they are."""
    if not name or name in BUILT_IN_CORPORA or name in extensions.corpora:
        return name
    path = Path(name).expanduser()
    is_path = path.exists() or "/" in name or name.endswith(".py")
    return str(path.absolute()) if is_path else name
