"""Builds a checked `FinetuneConfig` from TOML files and overrides. Does not import torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_moe.config import trust as trusted
from titan_moe.config.extensions import TRACKER_PACKAGES
from titan_moe.config.load import (
    COMMAND_LINE,
    build_table,
    check_values,
    find_config,
    merge_file,
    override_value,
    parse_overrides,
    set_value,
)
from titan_moe.errors import UserError
from titan_moe.finetune.tables import FinetuneConfig, finetune_class

MUST_BE_GIVEN = ("model.path", "data.train")


FILE_KEYS = ("model.path", "data.train", "data.validation", "data.chat_template")
"""Keys that name files or directories."""


def load_finetune(name: str, overrides: Sequence[str], world_size: int = 1, trust: bool = False) -> FinetuneConfig:
    """Reads, merges and checks a configuration of `titan-moe finetune`.

    name: a file of `train_configs/` with or without `.toml`, or a path. overrides: `--section.key=value` words, which win.
    world_size: the number of ranks. trust: read the files that a run's stored config.toml names. Raises UserError."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    path, table = find_config(name, finetune=True), finetune_class()
    merge_file(values, origins, path)
    pairs = parse_overrides(overrides, table)
    if trusted.is_stored(path):
        if not trust and not trusted.is_own(values):
            trusted.check_files(values, [key for key, _ in pairs], str(path), FILE_KEYS)
        # The run directory may have been moved: it is where its config.toml is.
        folder = path.absolute().parent
        set_value(values, "job.output_dir", str(folder.parent))
        set_value(values, "job.name", folder.name)
    for key, raw in pairs:
        set_value(values, key, override_value(key, raw, table))
        origins[key] = COMMAND_LINE
    check_values(values, lambda key: origins.get(key, str(path)))
    config = build_table(table, values, origins, str(path), "finetune")
    if not config.job.name:
        config = config.model_copy(update={"job": config.job.model_copy(update={"name": path.stem})})
    check(config, origins, path, world_size)
    return config


def check(config: FinetuneConfig, origins: dict[str, str], path: Path, world_size: int) -> None:
    """Raises UserError for options that can't work together."""

    def wrong(key: str, problem: str) -> UserError:
        return UserError(f"{origins.get(key, path)}: {key} = {value_of(config, key)!r}: {problem}")

    if "/" in config.job.name or config.job.name in (".", ".."):
        raise wrong("job.name", "is the name of a directory; set where it is with job.output_dir")
    for key in MUST_BE_GIVEN:
        if not value_of(config, key):
            raise wrong(key, f"must be given: --{key}=...")
    lora, training = config.lora, config.training
    if lora.rank and lora.dropout and (lora.feed_forward or lora.experts or lora.router):
        raise wrong(
            "lora.dropout",
            "PEFT has dropout only on modules, so only in attention; set 0, or lora.feed_forward, lora.experts and "
            "lora.router to false",
        )
    if lora.rank and not (lora.attention or lora.feed_forward or lora.experts or lora.router):
        raise wrong(
            "lora.rank", "no part of the model gets an adapter; set lora.attention, lora.experts or lora.router"
        )
    if lora.merge and not lora.rank:
        raise wrong("lora.merge", "there are no adapters to merge with lora.rank = 0")
    if training.batch_size % (training.microbatch_size * world_size):
        raise wrong(
            "training.batch_size",
            f"must be a multiple of training.microbatch_size times the number of ranks, {training.microbatch_size} * "
            f"{world_size}",
        )
    if config.data.validation and config.data.validation_fraction:
        raise wrong("data.validation_fraction", "data.validation names files for validation; give one of the two")
    if config.balancer.center and not config.balancer.rate:
        raise wrong("balancer.center", "has no effect with balancer.rate = 0")
    unknown = [name for name in config.metrics.trackers if name not in TRACKER_PACKAGES]
    if unknown:
        raise wrong("metrics.trackers", f"there are {', '.join(TRACKER_PACKAGES)}")
    for name, options in config.regularizers.options().items():
        if name not in config.regularizers.measure and options.weight == 0 and options.warmup_steps:
            raise wrong(f"regularizers.{name}.warmup_steps", "has no effect with weight 0")


def value_of(config: FinetuneConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
