"""The checkpoints that a user names for reading, and the configuration to run their model with. Does not import torch."""

from collections.abc import Sequence
from pathlib import Path

from titan_moe.checkpoint.declared import check_size
from titan_moe.checkpoint.run_dir import saved_steps
from titan_moe.checkpoint.state import STATE_FILE, read_state
from titan_moe.config.load import saved_config
from titan_moe.config.tables import Config
from titan_moe.errors import UserError


def chosen_checkpoints(paths: Sequence[Path], every: bool) -> list[Path]:
    """The paths that are checkpoints, and of run directories the newest checkpoint (`every`: all). Raises UserError."""
    checkpoints = []
    for path in paths:
        steps = saved_steps(path / "checkpoints")
        if steps:
            checkpoints += [path / "checkpoints" / f"step-{step:08d}" for step in (steps if every else steps[-1:])]
        elif (path / STATE_FILE).exists():
            checkpoints.append(path)
        else:
            raise UserError(f"{path}: neither a checkpoint nor a run directory with one")
    return checkpoints


def from_checkpoint(
    paths: Sequence[Path], every: bool, words: Sequence[str], world: int, trust: bool = False
) -> tuple[list[Path], Config]:
    """The checkpoints of `chosen_checkpoints`, and their configuration without the parallelism that they were trained
    with. words: overrides, `--section.key=value`. trust: let the configuration name files and modules."""
    checkpoints = chosen_checkpoints(paths, every)
    state = read_state(checkpoints[0], "checkpoint")
    reset = ("parallelism", "compile", "activation_checkpoint")
    config = saved_config(state.config, str(checkpoints[0]), words, world_size=world, reset=reset, trust=trust)
    check_size(config.model, checkpoints[0])
    return checkpoints, config
