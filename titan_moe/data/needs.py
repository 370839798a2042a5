"""What a configuration needs that is not on this machine: packages and a tokenizer. Said at once, each with its remedy."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from titan_moe.config import extensions
from titan_moe.config.tables import Config
from titan_moe.errors import UserError, pip_install, python


def check_needs(config: Config, has_tokenizer: bool) -> None:
    """Raises UserError that lists everything which is missing.

    has_tokenizer: the run goes on, or starts from weights with a tokenizer of their own.
    """
    missing = [*missing_packages(config), *([] if has_tokenizer else missing_tokenizer(config.tokenizer.path))]
    if len(missing) > 1:
        raise UserError("\n  ".join([f"{len(missing)} things are missing:", *missing]))
    for line in missing:
        raise UserError(line)


def needed_extras(config: Config) -> list[str]:
    """The extras of pyproject.toml, of those with a lock of their own, whose packages the configuration needs."""
    return ["hf"] if extensions.is_streamed(config.data.corpus) else []


def missing_packages(config: Config) -> Iterator[str]:
    """Packages of the corpus and of trackers, a line each."""
    if extensions.is_streamed(config.data.corpus) and not installed("datasets"):
        yield (
            f"data.corpus = {config.data.corpus!r} needs the package datasets: {pip_install('datasets')}; or give the path of "
            "local files (JSONL, also compressed, or Parquet)"
        )
    for name in config.metrics.trackers:
        if name in extensions.TRACKER_PACKAGES and name not in extensions.trackers and not installed(name):
            yield f"metrics.trackers: {name!r} needs a package that is not installed: {pip_install(name)}"


def missing_tokenizer(path: str) -> Iterator[str]:
    """A tokenizer's file that does not exist, in a line that says how to get one."""
    if path and not Path(path).exists():
        get = python("scripts/get_tokenizer.py")
        yield (
            f"tokenizer.path = {path!r}: no such file; `{get} llama-2` fetches LLaMA-2's (it needs a Hugging Face "
            f"token), `{get} open-32k` one of 32,000 pieces that needs none"
        )


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
