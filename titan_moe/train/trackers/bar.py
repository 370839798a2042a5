"""A progress bar as the last line of the terminal behind stderr.

It is not rich's live display, which hides the cursor: a killed process would leave it hidden.
"""

import time

from rich.console import Console
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.segment import ControlType
from rich.text import Text

REDRAW_SECONDS = 0.2


class Bar:
    def __init__(self, steps: int) -> None:
        self.terminal = Console(stderr=True)
        columns = (TaskProgressColumn(), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.terminal, expand=True)
        self.task = self.progress.add_task("", total=steps)
        self.shown, self.drawn = False, 0.0

    def start(self, step: int) -> None:
        """Counts from `step` on."""
        self.progress.reset(self.task, completed=step)

    def draw(self, step: int) -> None:
        """Shows that `step` is done; does nothing shortly after the last time."""
        if time.monotonic() - self.drawn <= REDRAW_SECONDS:
            return
        self.progress.update(self.task, completed=step)
        narrower = self.terminal.options.update_width(self.terminal.width - 1)  # a full line would wrap
        line = self.terminal.render_lines(self.progress.get_renderable(), narrower, pad=False)[0]
        self.terminal.print(Text.assemble(*((part.text, part.style or "") for part in line)), end="\r")
        self.shown, self.drawn = True, time.monotonic()

    def erase(self) -> None:
        """Clears the line, before something else is written there."""
        if self.shown:
            self.terminal.control(Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN))
            self.shown = False
