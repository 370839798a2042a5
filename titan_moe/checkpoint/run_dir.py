"""A run's directory `{job.output_dir}/{job.name}/`: its files, its lock, and the state to resume from.

    config.toml   metrics.jsonl   tensorboard/   checkpoints/step-00000100/   logs/rank-0.log

Nothing here imports torch, so that a second `./run_train.sh` can say "finished" at once.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from titan_moe.checkpoint.manifest import DamageError, read_manifest
from titan_moe.config.describe import to_toml
from titan_moe.config.tables import Config
from titan_moe.errors import UserError

FORMAT_VERSION = 2
STATE_FILE = "state.json"
STATE_KEYS = ("step", "config", "data", "tokenizer", "scales", "norms", "skipped")

# Keys that may change when a run resumes. A change of any other key is refused (docs/checkpoints.md).
MAY_CHANGE = (
    "job.name",
    "job.output_dir",
    "data.cache_dir",
    "tokenizer.path",
    "training.steps",
    "training.microbatch_size",
    "training.max_grad_norm",
    "training.skip_spikes",
    "training.deterministic",
    "optimizer.lr",
    "optimizer.weight_decay",
    "lr_scheduler",
    "parallelism",
    "compile",
    "activation_checkpoint",
    "checkpoint",
    "validation",
    "metrics",
    "profiling",
    "extensions",
)


class RunDir:
    def __init__(self, config: Config, rank: int = 0) -> None:
        self.rank = rank
        self.path = Path(config.job.output_dir) / config.job.name
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"
        self.log = self.path / "logs" / f"rank-{rank}.log"
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Creates the directories; rank 0 also takes the lock. Raises UserError.

        The operating system releases the lock when the process dies."""
        try:
            for folder in (self.checkpoints, self.log.parent):
                folder.mkdir(parents=True, exist_ok=True)
            if self.rank != 0:
                return
            self._lock = (self.path / ".lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in self.checkpoints.glob(".step-*"):  # unfinished checkpoints of a process that was killed
                shutil.rmtree(left)
        except BlockingIOError as error:
            raise UserError(
                f"job.name: another process is training in {self.path}; wait for it, or choose another --job.name"
            ) from error
        except OSError as error:
            raise UserError(
                f"job.output_dir: {error.filename or self.path}: can't be written: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()

    def write_config(self, config: Config) -> None:
        temporary = self.path / ".config.toml"
        temporary.write_text(to_toml(config))
        temporary.replace(self.path / "config.toml")

    def saved_steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return saved_steps(self.checkpoints)

    def finished(self, steps: int) -> str | None:
        """How to continue a run that has a checkpoint of step `steps` or later; None for any other run."""
        saved = self.saved_steps()
        if not saved or saved[-1] < steps:
            return None
        return (
            f"{self.path} is finished: {saved[-1]} steps.\n"
            f"  more steps:   --training.steps={2 * saved[-1]}\n"
            f"  a fresh run:  --job.name={self.path.name}-2\n"
            f"  its curves:   tensorboard --logdir {self.path.parent}"
        )

    def set_aside(self, checkpoint: Path, reason: str) -> Path:
        """Renames a checkpoint to aside-NAME-N, so that it is not loaded, and writes the reason into it."""
        number = 1
        while (renamed := checkpoint.with_name(f"aside-{checkpoint.name}-{number}")).exists():
            number += 1
        checkpoint.rename(renamed)
        (renamed / "REASON").write_text(f"{reason}\n")
        return renamed

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def newest(self) -> Path | None:
        steps = self.saved_steps()
        return self.checkpoint(steps[-1]) if steps else None

    def cut_metrics(self, step: int) -> int:
        """Removes the rows after `step` (all rows when it is 0: the run starts over) and lines that are no rows, such
        as the incomplete last line of a killed run. Returns the number of the latter."""
        if not self.metrics.exists():
            return 0
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        rows = [read_row(line) for line in lines]
        kept = [line for line, row in zip(lines, rows, strict=True) if step and row is not None and row["step"] <= step]
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(self.metrics)
        return rows.count(None)

    def has_validation(self, step: int) -> bool:
        """Whether metrics.jsonl has the row of the validation at a step."""
        if not self.metrics.exists():
            return False
        return any((row["kind"], row["step"]) == ("validation", step) for row in read_rows(self.metrics))

    def cut_tensorboard(self, step: int) -> None:
        """Deletes TensorBoard's files when the run starts over (step 0); else its writer purges later steps."""
        if step == 0:
            shutil.rmtree(self.tensorboard, ignore_errors=True)


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; incomplete lines are skipped."""
    rows = map(read_row, metrics.read_bytes().splitlines(keepends=True))
    return [row for row in rows if row is not None]


def read_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line of metrics.jsonl; None when the line is incomplete or not a row."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    good = isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str)
    return row if good else None


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints with a readable manifest and files of the right sizes, oldest first."""
    return [step for step in all_steps(checkpoints) if looks_whole(checkpoints / f"step-{step:08d}")]


def all_steps(checkpoints: Path) -> list[int]:
    """Steps of all checkpoints, damaged ones too."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in checkpoints.glob("step-*"))
    return sorted(int(name.group(1)) for name in names if name)


def looks_whole(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except DamageError:
        return False
    return True


def read_state(checkpoint: Path, origin: str) -> dict[str, Any]:
    """A checkpoint's state.json. Raises UserError for what is none, is damaged, or comes from another version."""
    path = checkpoint / STATE_FILE
    if not path.exists():
        raise UserError(f"{origin}: {checkpoint} is not a checkpoint (it has no {STATE_FILE})")
    try:
        state = json.loads(path.read_text())
        version = state["format_version"]
        missing = [key for key in STATE_KEYS if key not in state]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{origin}: {path} is damaged: {error}") from error
    if version == FORMAT_VERSION and missing:
        raise UserError(f"{origin}: {path} is damaged: it lacks {', '.join(missing)}")
    if version != FORMAT_VERSION:
        raise UserError(f"{origin}: {checkpoint} has format version {version}; this program reads {FORMAT_VERSION}")
    assert isinstance(state, dict)
    return state


def format_version(checkpoint: Path) -> int | None:
    """The format version of a checkpoint that may be damaged; None when it can't be read."""
    try:
        version = json.loads((checkpoint / STATE_FILE).read_text())["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return version if isinstance(version, int) else None


def changed_keys(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    keys = []
    for key in sorted({*saved, *current}):
        name = f"{prefix}{key}"
        a, b = saved.get(key), current.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += changed_keys(a, b, f"{name}.")
        elif a != b:
            keys.append(name)
    return keys


def check_unchanged(saved: dict[str, Any], config: Config, checkpoint: Path) -> None:
    """Raises UserError when a key that may not change on resuming has changed.

    saved: as an earlier version may have written it; keys that it lacks have their defaults.
    """
    with contextlib.suppress(ValidationError):  # then the comparison names what differs
        saved = type(config).model_validate(saved).model_dump(mode="json")
    current, chosen = config.model_dump(mode="json"), config.optimizer.name
    options = {name for values in (saved, current) for name, v in values["optimizer"].items() if isinstance(v, dict)}
    free_keys = [*MAY_CHANGE, f"optimizer.{chosen}.lr", *(f"optimizer.{name}" for name in options - {chosen})]
    free_keys += ["data"] if config.checkpoint.allow_new_data else []
    for key in changed_keys(saved, current):
        if not any(key == free or key.startswith(f"{free}.") for free in free_keys):
            raise UserError(
                f"{key}: is {value_at(current, key)!r}, but {checkpoint} was made with {value_at(saved, key)!r}; set it back, "
                "or choose another --job.name (and checkpoint.load_path to start from these weights)"
            )


def value_at(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None when there is none."""
    node: Any = values
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


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
