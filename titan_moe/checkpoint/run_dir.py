"""A run's directory `{job.output_dir}/{job.name}/`: its files, its lock, and the state to resume from.

    config.toml   tokenizer.model   metrics.jsonl   tensorboard/   checkpoints/step-00000100/   logs/rank-0.log

A run directory may come from elsewhere: below it nothing is written through a symbolic link, and only regular files are read.

Nothing here imports torch, so that a second `./run_train.sh` can say "finished" at once.
"""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import tomli

from titan_moe.checkpoint.manifest import DamageError, read_manifest
from titan_moe.checkpoint.state import State, read_state
from titan_moe.config.describe import to_toml
from titan_moe.config.tables import Config
from titan_moe.config.trust import remember
from titan_moe.errors import UserError
from titan_moe.runtime.files import METRICS_BYTES, own_folder, read_file, refuse_link, write_file
from titan_moe.runtime.json_file import one_line
from titan_moe.runtime.lock import FileLock

WRITTEN = (
    "checkpoints",
    "logs",
    "tensorboard",
    "profile",
    "wandb",
    "trackio",
    "config.toml",
    "metrics.jsonl",
    "tokenizer.model",
    "tokenizer.json",
)
"""What a run writes into its directory, and what trackers write."""
NUMBERS = {  # fields that a row of metrics.jsonl must have
    "train": ("tokens", "ce"),
    "validation": ("loss", "perplexity", "bits_per_byte"),
}


class RunDir:
    def __init__(self, config: Config, rank: int = 0) -> None:
        self.rank = rank
        self.path = Path(config.job.output_dir) / config.job.name
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"
        self.log = self.path / "logs" / f"rank-{rank}.log"
        self.lock = FileLock(self.path / ".lock")
        self.states: dict[Path, State] = {}

    def open(self) -> None:
        """Creates the directories; rank 0 also takes the lock. Raises UserError.

        The operating system releases the lock when the process dies."""
        try:
            for name in WRITTEN:
                refuse_link(self.path / name)
            refuse_link(self.log)
            for name in ("checkpoints", "logs"):
                own_folder(self.path, name)
            if self.rank != 0:
                return
            if not self.lock.acquire():
                raise UserError(
                    f"job.name: another process is training in {self.path}; wait for it, or choose another --job.name"
                )
            for left in self.checkpoints.glob(".step-*"):  # unfinished checkpoints of a process that was killed
                remove(left)
        except OSError as error:
            raise UserError(
                f"job.output_dir: {error.filename or self.path}: can't be written: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Releases the lock."""
        self.lock.release()

    def write_tokenizer(self, model: bytes) -> None:
        from titan_moe.data.stored import tokenizer_file  # takes longer than all else here

        path = self.path / tokenizer_file(model)
        if not path.is_file() or path.read_bytes() != model:
            write_file(path, model)

    def write_config(self, config: Config) -> None:
        """Writes config.toml, and remembers it as this user's own."""
        write_file(self.path / "config.toml", to_toml(config))
        remember(config)

    def saved_steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return saved_steps(self.checkpoints)

    def finished(self, saved: int, steps: int) -> str | None:
        """How to continue a run whose newest checkpoint is of step `steps` or later; None for any other run.

        saved: the step of that checkpoint; 0: there is none."""
        if saved < steps:
            return None
        return (
            f"{self.path} is finished: {saved} steps.\n"
            f"  more steps:   --training.steps={2 * saved}\n"
            f"  a fresh run:  --job.name={self.path.name}-2\n"
            f"  its curves:   tensorboard --logdir {self.path.parent}"
        )

    def set_aside(self, checkpoint: Path, reason: str) -> Path:
        """Renames a checkpoint to aside-NAME-N, so that it is not loaded, and writes the reason into it."""
        number = 1
        while (renamed := checkpoint.with_name(f"aside-{checkpoint.name}-{number}")).exists():
            number += 1
        checkpoint.rename(renamed)
        if not renamed.is_symlink():
            write_file(renamed / "REASON", f"{reason}\n")
        return renamed

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def state(self, checkpoint: Path) -> State:
        """The state.json of one of the run's checkpoints, which is read once. Raises UserError."""
        if checkpoint not in self.states:
            self.states[checkpoint] = read_state(checkpoint, "checkpoint")
        return self.states[checkpoint]

    def newest(self) -> Path | None:
        steps = self.saved_steps()
        return self.checkpoint(steps[-1]) if steps else None

    def lost_steps(self) -> int:
        """Steps of a run that saved checkpoints of which none is left, by its rows; 0 for a run that had saved none yet.

        Raises UserError when config.toml or metrics.jsonl can't be read."""
        if not self.metrics.is_symlink() and not self.metrics.exists():
            return 0
        last = max((row["step"] for row in read_rows(self.metrics)), default=0)
        try:
            stored = tomli.loads(read_file(self.path / "config.toml").decode("utf-8"))
            first_save = min(stored["checkpoint"]["interval"] or math.inf, stored["training"]["steps"])
        except FileNotFoundError:
            first_save = 0
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path / 'config.toml'}: can't be read: {one_line(error)}") from error
        return last if last >= first_save else 0

    def cut_metrics(self, step: int) -> int:
        """Moves the rows after `step` (all rows when it is 0: the run starts over) from metrics.jsonl to metrics-aside.jsonl.

        Also lines that are no rows, such as the incomplete last line of a killed run. Returns the number of these."""
        if not self.metrics.exists():
            return 0
        lines = read_file(self.metrics, METRICS_BYTES).splitlines(keepends=True)
        rows = [read_row(line) for line in lines]
        keeps = [bool(step and row is not None and row["step"] <= step) for row in rows]
        if not all(keeps):
            aside = self.path / "metrics-aside.jsonl"
            cut = [line for line, keep in zip(lines, keeps, strict=True) if not keep]
            before = read_file(aside, METRICS_BYTES) if aside.exists() else b""
            write_file(aside, before + b"".join(cut).rstrip(b"\n") + b"\n")
            write_file(self.metrics, b"".join(line for line, keep in zip(lines, keeps, strict=True) if keep))
        return rows.count(None)

    def has_validation(self, step: int) -> bool:
        """Whether metrics.jsonl has the row of the validation at a step."""
        if not self.metrics.exists():
            return False
        return any((row["kind"], row["step"]) == ("validation", step) for row in read_rows(self.metrics))

    def cut_tensorboard(self, step: int) -> None:
        """Renames TensorBoard's directory when the run starts over (step 0); else its writer purges later steps."""
        if step == 0 and self.tensorboard.exists():
            number = 1
            while (renamed := self.path / f"aside-tensorboard-{number}").exists():
                number += 1
            self.tensorboard.rename(renamed)


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; incomplete lines are skipped. Raises UserError when it can't be read."""
    try:
        lines = read_file(metrics, METRICS_BYTES).splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{metrics}: can't be read: {error.strerror}") from error
    return [row for row in map(read_row, lines) if row is not None]


def read_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line of metrics.jsonl; None when the line is incomplete or not a row."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return None
    step = row.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        return None
    numbers = [value for name, value in row.items() if name not in ("kind", "data_crc")]
    complete = all(name in row for name in NUMBERS.get(row["kind"], ()))
    return row if complete and all(map(is_number, numbers)) else None


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that fits a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints with an unaltered manifest and files of the right sizes, oldest first. Raises UserError when
    that can't be told, since a file can't be read now."""
    return [step for step in all_steps(checkpoints) if looks_whole(checkpoints / f"step-{step:08d}")]


def newest_of(given: str) -> Path:
    """The newest checkpoint of a run directory; any other path as it is. Raises UserError."""
    path = Path(given).expanduser()
    steps = saved_steps(path / "checkpoints")
    return path / "checkpoints" / f"step-{steps[-1]:08d}" if steps else path


def all_steps(checkpoints: Path) -> list[int]:
    """Steps of all checkpoints, damaged ones too. Raises UserError when the directory can't be read."""
    try:
        names = [entry.name for entry in os.scandir(checkpoints) if entry.is_dir()] if checkpoints.exists() else []
    except OSError as error:
        raise UserError(f"{checkpoints}: can't be read: {error.strerror}") from error
    steps = [int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{8,18}", name)]
    return sorted(step for step in steps if f"step-{step:08d}" in names)


def looks_whole(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except DamageError:
        return False
    return True


def remove(path: Path) -> None:
    """Deletes a directory and what is in it; of a symbolic link only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Syncs the names in a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
