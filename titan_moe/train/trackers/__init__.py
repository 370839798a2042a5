"""Where a run's rows go: metrics.jsonl, the console, TensorBoard, Weights & Biases, Trackio and the user's own trackers."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from titan_moe.config import extensions
from titan_moe.config.tables import Config
from titan_moe.runtime.files import open_append
from titan_moe.train.trackers.console import Console
from titan_moe.train.trackers.dashboards import TensorBoard, Trackio, WandB


class JsonLines:
    """metrics.jsonl: one JSON object a line, flushed as it is written."""

    def __init__(self, config: Config, run_dir: Path) -> None:  # noqa: ARG002 - every tracker's arguments
        self.file: IO[str] = open_append(run_dir / "metrics.jsonl")

    def log(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


ALWAYS: dict[str, extensions.TrackerFactory] = {"jsonl": JsonLines, "console": Console}
CHOSEN: dict[str, extensions.TrackerFactory] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


@contextlib.contextmanager
def open_trackers(config: Config, run_dir: Path, step: int, first: bool) -> Iterator[list[extensions.Tracker]]:
    """metrics.jsonl, the console and what `[metrics]` names, on the first rank. step: of the resumed checkpoint, or 0."""
    names = [*ALWAYS, *(["tensorboard"] if config.metrics.tensorboard else []), *config.metrics.trackers]
    factories = ALWAYS | CHOSEN | extensions.trackers
    with contextlib.ExitStack() as stack:
        trackers = []
        for name in dict.fromkeys(names if first else ()):
            tracker = factories[name](config, run_dir)
            if hasattr(tracker, "start"):
                tracker.start(step)
            stack.callback(tracker.close)
            trackers.append(tracker)
        yield trackers
