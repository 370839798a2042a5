"""A line to read every `metrics.interval` steps, and a progress bar on a terminal."""

import logging
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.segment import ControlType
from rich.text import Text

from titan_moe.config.tables import Config

log = logging.getLogger("titan_moe")
REDRAW_SECONDS = 0.2


class Console:
    """Prints rows through the log. The bar is the last line of the terminal behind stderr.

    It is not rich's live display, which hides the cursor: a killed process would leave it hidden.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:  # noqa: ARG002 - every tracker's arguments
        self.steps, self.interval = config.training.steps, config.metrics.interval
        self.recent: list[float] = []
        self.terminal = Terminal(stderr=True)
        self.interactive = self.terminal.is_terminal
        columns = (TaskProgressColumn(), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.terminal, expand=True)
        self.task = self.bar.add_task("", total=self.steps)
        self.shown, self.drawn = False, 0.0

    def start(self, step: int) -> None:
        self.bar.reset(self.task, completed=step)
        log.addFilter(self.erase)

    def log(self, row: dict[str, Any]) -> None:
        if row["kind"] == "validation":
            log.info(
                f"validation at step {row['step']}: loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}  "
                f"bits per byte {row['bits_per_byte']:.4f}"
            )
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
        if self.interactive and time.monotonic() - self.drawn > REDRAW_SECONDS:
            self.bar.update(self.task, completed=row["step"])
            narrower = self.terminal.options.update_width(self.terminal.width - 1)  # a full line would wrap
            line = self.terminal.render_lines(self.bar.get_renderable(), narrower, pad=False)[0]
            self.terminal.print(Text.assemble(*((part.text, part.style or "") for part in line)), end="\r")
            self.shown, self.drawn = True, time.monotonic()

    def erase(self, record: logging.LogRecord | None = None) -> bool:  # noqa: ARG002 - a filter's signature
        """Clears the bar before a log line goes there, and lets the line pass."""
        if self.shown:
            self.terminal.control(Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN))
            self.shown = False
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
