"""titan-moe sweep: a grid of configurations, some at a time, and its comparisons."""

from pathlib import Path

from titan_moe.analysis.sweep.sweep import run_sweep
from titan_moe.errors import UserError
from titan_moe.verbs.words import take_flag, take_number, take_option


def run(words: list[str]) -> int:
    only_tables, words = take_flag(words, "--tables")
    name, words = take_option(words, "--config", "")
    folder, words = take_option(words, "--output", "")
    base, words = take_option(words, "--base", "")
    processes, words = take_number(words, "--processes", 1, "runs at the same time")
    if not name:
        raise UserError("--config: which sweep? a file of train_configs/sweeps/ by name, or a path")
    return run_sweep(name, base, Path(folder) if folder else None, words, processes, only_tables)
