"""Command-line options that several verbs share, and the argument parser of all verbs."""

import argparse
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from titan_moe.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError for a mistake, accepts no abbreviated options, and keeps the line breaks of help texts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def add_overrides(parser: argparse.ArgumentParser, verb: str = "train") -> None:
    """Accepts `--section.key=value` and `--section.key value` words, as `arguments.overrides`.

    `titan_moe.cli` collects these words before argparse sees the others; this entry shows them in `--help`.
    verb: whose `--help` lists the options.
    """
    meaning = f"any option of the configuration, also as --section.key=VALUE; `titan-moe {verb} --help` lists them"
    parser.add_argument("--section.key", dest="overrides", default=[], metavar="VALUE", help=meaning)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and overrides: `load_config(arguments.config, arguments.overrides)` reads them."""
    meaning = "a file of train_configs/ by name, or a path (default: %(default)s)"
    parser.add_argument("--config", default="debug", help=meaning)
    add_trust(parser)
    add_overrides(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust`."""
    meaning = "import modules that a file names, and read files that a run's stored configuration names"
    parser.add_argument("--trust", action="store_true", help=meaning)


def add_number(
    parser: argparse.ArgumentParser, option: str, default: int, meaning: str, least: int = 1, alias: str = ""
) -> None:
    """Adds an option for an integer of at least `least`. UserError names the option, the value and the meaning.

    alias: another name of the option."""

    def number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
            raise UserError(f"{option} = {text[:80]!r}: {meaning}, {least} or more")
        return int(text)

    names = [option, *filter(None, [alias])]
    parser.add_argument(*names, type=number, default=default, metavar="N", help=f"{meaning} (default: {default})")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Adds `--placement`."""
    meaning = (
        "a file of `titan-moe place`: ranks hold the experts that it names, and take the texts that choose them first"
    )
    parser.add_argument("--placement", type=path_argument, metavar="FILE", help=meaning)


def path_argument(text: str) -> Path:
    """The path that a user typed; no shell expands the `~` of `--output=~/page`. Raises UserError."""
    if "\0" in text or not text:
        raise UserError(f"{text!r} is not a path")
    return Path(os.path.expanduser(text))


def file_argument(text: str) -> Path:
    """A path to write a file to. Raises UserError when there is a directory."""
    path = path_argument(text)
    if path.is_dir():
        raise UserError(f"--output = {text!r} is a directory; name a file in it")
    return path


def directory_argument(text: str) -> Path:
    """A path to write files below. Raises UserError when there, or above it, is a file."""
    path = path_argument(text)
    above = next((part for part in (path, *path.parents) if part.exists()), path)
    if above.is_file():
        raise UserError(f"--output = {text!r}: {str(above)!r} is a file; name a directory")
    return path


def add_runs(parser: argparse.ArgumentParser, count: str | None = "+") -> None:
    """Adds run directories or checkpoints, and the text to run their model on."""
    parser.add_argument(
        "runs", nargs=count, type=path_argument, metavar="RUN", help="a run directory or one of its checkpoints"
    )
    add_trust(parser)
    meaning = "text to read, as data.corpus (default: the run's validation text)"
    parser.add_argument("--text", default="", metavar="CORPUS", help=meaning)
    add_number(parser, "--sequences", 0, "sequences of the text to read (0: all)", 0)
