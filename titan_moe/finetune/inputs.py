"""What a fine-tuning run reads and continues from, checked before anything slow is imported. Does not import torch."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import tomli
from pydantic import BaseModel, ConfigDict

from titan_moe.checkpoint.run_dir import RunDir, remove
from titan_moe.checkpoint.state import Natural
from titan_moe.config.describe import to_toml
from titan_moe.config.tables import Config
from titan_moe.config.trust import remember
from titan_moe.errors import UserError
from titan_moe.finetune.load import value_of
from titan_moe.finetune.rows import Rows, read_rows, split
from titan_moe.finetune.tables import FinetuneConfig
from titan_moe.runtime.files import read_file, write_file
from titan_moe.runtime.json_file import one_line, read_json
from titan_moe.runtime.optional import check_installed

STATE = "trainer_state.json"
"""The file that Transformers' Trainer writes last into a checkpoint."""
PACKAGES = ("transformers", "trl", "accelerate", "datasets", "safetensors")
FIXED = (
    "job.seed",
    "model.path",
    "model.revision",
    "model.dtype",
    "lora.rank",
    "lora.alpha",
    "lora.attention",
    "lora.feed_forward",
    "lora.experts",
    "lora.router",
    "data.train",
    "data.validation_fraction",
    "data.seq_len",
    "data.packing",
    "data.completion_only",
    "training.batch_size",
)
"""Keys that must not change while a run goes on: its checkpoints would not load, or it would train on other batches."""


class Inputs(NamedTuple):
    run_dir: RunDir
    training: Rows
    validation: Rows | None
    checkpoint: Path | None
    """The newest complete checkpoint of the run; None for a new run."""
    step: int
    """The step of this checkpoint, else 0."""
    finished: str
    """What to tell the user when the run has made all its steps; else empty."""


class TrainerState(BaseModel):
    """The part of trainer_state.json that is read here."""

    model_config = ConfigDict(extra="ignore", strict=True)

    global_step: Natural
    max_steps: Natural


def check_inputs(config: FinetuneConfig, rank: int) -> Inputs:
    """Reads the rows and finds the checkpoint to go on from. Raises UserError."""
    check_installed([*PACKAGES, *(["peft"] if config.lora.rank else [])], "hf", "finetune")
    folder = Path(config.model.path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model.path = {config.model.path!r}: has no config.json; give the directory of a model")
    run_dir = RunDir(Config(job=config.job), rank)
    check_not_a_training_run(run_dir)
    training, validation = read_data(config)
    checkpoint = newest(run_dir)
    if checkpoint is None:
        return Inputs(run_dir, training, validation, None, 0, "")
    state = state_of(checkpoint)
    assert state is not None  # else it would not be complete
    stored = stored_values(run_dir)
    check_unchanged(config, stored, run_dir)
    same_end = all(stored_value(stored, key) == value_of(config, key) for key in ("training.steps", "training.epochs"))
    step, ends = state.global_step, config.training.steps
    finished = step >= ends if ends else step >= state.max_steps and same_end
    message = f"{run_dir.path} is finished: {step} steps.\n  more steps:   --training.steps={2 * step}\n"
    message += f"  a fresh run:  --job.name={run_dir.path.name}-2"
    return Inputs(run_dir, training, validation, checkpoint, step, message if finished else "")


def read_data(config: FinetuneConfig) -> tuple[Rows, Rows | None]:
    """Rows to train on and rows for validation."""
    training = read_rows(config.data.train, "data.train")
    if not config.data.validation:
        return split(training, config.data.validation_fraction, config.job.seed)
    validation = read_rows(config.data.validation, "data.validation")
    if (validation.kind, validation.conversational) != (training.kind, training.conversational):
        raise UserError("data.validation: has rows of another kind than data.train")
    return training, validation


def newest(run_dir: RunDir) -> Path | None:
    """The complete checkpoint with the largest step."""
    complete = [path for path in checkpoints(run_dir) if state_of(path) is not None]
    return complete[-1] if complete else None


def checkpoints(run_dir: RunDir) -> list[Path]:
    """All checkpoints, also incomplete ones, by step."""
    found = [
        path for path in run_dir.checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,9}", path.name)
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def state_of(checkpoint: Path) -> TrainerState | None:
    """The state of a checkpoint; None when it is incomplete: the process was killed while it wrote it. Raises UserError."""
    try:
        state = TrainerState.model_validate(read_json(checkpoint / STATE))
    except (FileNotFoundError, ValueError):  # a ValidationError is a ValueError
        return None
    except OSError as error:
        raise UserError(f"{checkpoint / STATE}: can't be read: {error.strerror}") from error
    return state if state.global_step == step_of(checkpoint) else None


def check_not_a_training_run(run_dir: RunDir) -> None:
    """Raises UserError for the directory of another verb's run."""
    if run_dir.saved_steps():
        raise UserError(f"job.name: {run_dir.path} is a run of `titan-moe train`; choose another --job.name")


def stored_values(run_dir: RunDir) -> dict[str, Any]:
    """The configuration that the run was started with. Raises UserError."""
    path = run_dir.path / "config.toml"
    try:
        return tomli.loads(read_file(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read: {one_line(error)}") from error


def stored_value(stored: dict[str, Any], key: str) -> Any:
    table, _, option = key.partition(".")
    values = stored.get(table)
    return values.get(option) if isinstance(values, dict) else None


def check_unchanged(config: FinetuneConfig, stored: dict[str, Any], run_dir: RunDir) -> None:
    """Raises UserError when a key that must stay the same differs from the run's."""
    for key in FIXED:
        before, now = stored_value(stored, key), value_of(config, key)
        if before != now:
            raise UserError(
                f"{key} = {now!r}: the run {run_dir.path} was started with {before!r}; go on with that, or choose another "
                "--job.name"
            )


def open_run(config: FinetuneConfig, inputs: Inputs) -> None:
    """Takes the run directory's lock, removes what a killed process left, and writes config.toml. On rank 0.

    Rows of metrics.jsonl after the checkpoint are moved aside, since their steps are made again."""
    run_dir = inputs.run_dir
    run_dir.open()
    if run_dir.rank != 0:
        return
    for path in checkpoints(run_dir):
        if path.is_dir() and state_of(path) is None:
            remove(path)
    run_dir.cut_metrics(inputs.step)
    run_dir.cut_tensorboard(inputs.step)
    write_file(run_dir.path / "config.toml", to_toml(config))
    remember(config)
