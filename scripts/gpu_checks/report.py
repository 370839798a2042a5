"""What a stage prints: lines of Markdown, as they come, and what the summary at the end needs to know."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DIFFERENT, FAILED = 10, 11
"""Exit statuses of a stage: two values that must be equal are not; something of it could not be run."""


class Report:
    """A stage's sizes, its device, the time that it has left, and its findings."""

    def __init__(self, toy: bool, seconds: float, facts: Path) -> None:
        """toy: sizes for a CPU. seconds: until the stage is stopped. facts: a file of findings of all stages so far."""
        import torch  # here, so that `check_gpu.py --help` does not wait for it

        self.toy, self.facts_file = toy, facts
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.different = self.failed = False
        self._end = time.monotonic() + seconds
        self._columns = 0

    @property
    def on_card(self) -> bool:
        return self.device.type == "cuda"

    @property
    def status(self) -> int:
        return DIFFERENT if self.different else FAILED if self.failed else 0

    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self._end - time.monotonic()

    def line(self, text: str = "") -> None:
        print(text, flush=True)

    def table(self, *columns: str) -> None:
        """Begins a table."""
        self._columns = len(columns)
        self.line()
        self.row(*columns)
        self.row(*["---"] * len(columns))

    def row(self, *cells: object) -> None:
        """A row of the table; cells that are missing at its end are empty."""
        texts = [str(cell).replace("|", "/") for cell in cells]
        self.line("| " + " | ".join(texts + [""] * (self._columns - len(texts))) + " |")

    @contextlib.contextmanager
    def trial(self, label: str) -> Iterator[None]:
        """What is run inside may raise: then the row names the error, and the stage goes on and counts as failed."""
        try:
            yield
        except Exception as error:
            import torch

            self.failed = True
            words = " ".join(str(error).split())[:200]
            self.row(label, f"**failed: {type(error).__name__}: {words}**")
            if self.on_card:
                torch.cuda.empty_cache()

    def enough(self, seconds: float, *cells: object) -> bool:
        """Whether this much time is left (at toy sizes a tenth of it). If not, a row says so and the stage counts as failed."""
        if self.left() >= (seconds / 10 if self.toy else seconds):
            return True
        self.failed = True
        self.row(*cells, "**no time left**")
        return False

    def equal(self, difference: float, tolerance: float) -> str:
        """A difference for a cell; one above the tolerance (or NaN) is marked, and the stage counts as different."""
        if difference <= tolerance:
            return f"{difference:.1e}"
        self.different = True
        return f"**{difference:.1e} > {tolerance:.0e}**"

    def same(self, found: object, wanted: object) -> str:
        """The same for values that have to be identical."""
        if found == wanted:
            return str(found)
        self.different = True
        return f"**{found}, not {wanted}**"

    def fact(self, name: str, value: float | str) -> None:
        """Keeps a finding for the summary."""
        with self.facts_file.open("a") as file:
            file.write(json.dumps({name: value}) + "\n")


def python_path() -> str:
    """PYTHONPATH of the processes of this check: its folders, then the user's own, which may have the packages."""
    paths = (str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(filter(None, paths))


def read_facts(path: Path) -> dict[str, Any]:
    """The findings of all stages so far; a later one replaces an earlier one of the same name."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        found |= json.loads(line)
    return found
