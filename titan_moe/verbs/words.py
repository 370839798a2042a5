"""The words after a verb of `titan-moe`: flags and options of its own, paths, and `--section.key=value`."""

from pathlib import Path

from titan_moe.config.load import load_config, world_size_from_environment
from titan_moe.config.tables import Config
from titan_moe.errors import UserError


def configured(words: list[str], world: int | None = None) -> Config:
    """What `--config` and `--section.key=value` words say. world: processes; None: as the environment says."""
    name, overrides = take_option(words, "--config", "debug")
    return load_config(name, overrides, world_size=world_size_from_environment() if world is None else world)


def take_flag(words: list[str], flag: str) -> tuple[bool, list[str]]:
    """Whether a word is there, and the other words."""
    return flag in words, [word for word in words if word != flag]


def take_option(words: list[str], option: str, default: str) -> tuple[str, list[str]]:
    """The value of `--option VALUE` or `--option=VALUE`, and the other words. Raises UserError when the value is missing."""
    value, rest = default, []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == option:
            if not words:
                raise UserError(f"{option} needs a value")
            value = words.pop(0)
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def take_number(words: list[str], option: str, default: int, meaning: str, least: int = 1) -> tuple[int, list[str]]:
    """The same, for a number of at least `least`."""
    value, rest = take_option(words, option, str(default))
    if not value.isdigit() or int(value) < least:
        raise UserError(f"{option} = {value!r}: {meaning}, {least} or more")
    return int(value), rest


def take_text(words: list[str], verb: str) -> tuple[str, int, list[Path], list[str]]:
    """`--text` and `--sequences`, the paths among the words, and the rest. Raises UserError for no path."""
    text, words = take_option(words, "--text", "")
    sequences, words = take_number(words, "--sequences", 0, "sequences of the text to read", 0)
    paths = [Path(word) for word in words if not word.startswith("-")]
    if not paths:
        raise UserError(f"{verb} needs a checkpoint or a run directory: titan-moe {verb} runs/debug")
    return text, sequences, paths, [word for word in words if word.startswith("-")]
