"""A line to read every `metrics.interval` steps, and a progress bar on a terminal."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_moe.config.tables import Config
from titan_moe.runtime.terminal import shows_bars

if TYPE_CHECKING:
    from titan_moe.train.trackers.bar import Bar

log = logging.getLogger("titan_moe")


class Console:
    """Prints rows through the log, above a progress bar where there is a terminal and rich is installed."""

    def __init__(self, config: Config, run_dir: Path) -> None:  # noqa: ARG002 - every tracker's arguments
        self.steps, self.interval = config.training.steps, config.metrics.interval
        self.recent: list[float] = []
        self.bar: Bar | None = None
        if shows_bars():
            from titan_moe.train.trackers import bar

            self.bar = bar.Bar(self.steps)

    def start(self, step: int) -> None:
        if self.bar is not None:
            self.bar.start(step)
            log.addFilter(self.erase)

    def log(self, row: dict[str, Any]) -> None:
        if row["kind"] == "validation":
            log.info(
                f"validation at step {row['step']}: loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}  "
                f"bits per byte {row['bits_per_byte']:.4f}"
            )
            return
        if row["kind"] == "eval":
            values = "  ".join(f"{name[5:]} {row[name]:.4g}" for name in row if name.startswith("eval/"))
            log.info(f"tasks at step {row['step']}: {values}")
            return
        self.recent = [*self.recent[-49:], row["step_seconds"]]
        if row["step"] % self.interval == 0 or row["step"] in (1, self.steps):
            left = (self.steps - row["step"]) * sorted(self.recent)[len(self.recent) // 2]
            terms = "  ".join(f"{name[4:]} {row[name]:.4g}" for name in row if name.startswith("reg/"))
            log.info(
                f"step {row['step']}/{self.steps}  {short(row['tokens'])} tokens  loss {row['loss']:.4f}  "
                f"ce {row['ce']:.4f}  {terms}  ppl {math.exp(min(row['ce'], 700)):.4g}  "
                f"{short(row['tokens_per_second'])} tok/s  left {duration(left)}"
            )
        if self.bar is not None:
            self.bar.draw(row["step"])

    def erase(self, record: logging.LogRecord | None = None) -> bool:  # noqa: ARG002 - a filter's signature
        """Clears the bar before a log line goes there, and lets the line pass."""
        if self.bar is not None:
            self.bar.erase()
        return True

    def close(self) -> None:
        self.erase()
        log.removeFilter(self.erase)


def short(number: float) -> str:
    """1234567 as 1.2M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
