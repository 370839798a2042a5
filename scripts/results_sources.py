"""Where the numbers of the results pages come from: rows of finished cells, or else the tables that the pages have.

docs/evidence/SWEEP/CELL.json          rows of the repository (`python scripts/results.py --keep`)
runs/sweeps/SWEEP/cells/CELL.json      rows of a sweep that was run here
docs/results_tables.md, results_copied.md   tables, for sweeps whose rows are in neither
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from scipy import stats

from titan_moe.analysis.sweep.grid import read_sweep
from titan_moe.analysis.sweep.rows import FOLDER, MEASURED, measured, read_row
from titan_moe.analysis.sweep.statistics import CONFIDENCE, paired
from titan_moe.analysis.sweep.sweep import SweepState
from titan_moe.analysis.sweep.tables import Group, grouped
from titan_moe.errors import UserError
from titan_moe.runtime.files import write_file

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE = ROOT / "docs" / "evidence"
SWEEPS = Path("runs") / "sweeps"
TABLE_PAGES = (ROOT / "docs" / "results_tables.md", ROOT / "docs" / "results_copied.md")
BLOCK = re.compile(r"(<!-- (\w+) (\w+): (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NUMBER = r"([+-]?[\d.]+(?:e[+-]?\d+)?)"

Result = Mapping[str, float]


class Difference(NamedTuple):
    """An arm's mean difference to the baseline over `pairs` seeds, and its 95% interval (nan for fewer than two pairs)."""

    pairs: int
    mean: float
    low: float
    high: float

    @property
    def deviation(self) -> float:
        """Standard deviation of the difference of one pair, from the interval; nan for fewer than two pairs."""
        if self.pairs < 2:
            return math.nan
        return (self.high - self.mean) / float(stats.t(self.pairs - 1).ppf(0.5 + CONFIDENCE / 2)) * self.pairs**0.5


class Source(Protocol):
    """Numbers of one sweep without a grid."""

    name: str

    def arms(self) -> list[str]:
        """Arms with a number, in the order of the sweep; the baseline first."""

    def seeds(self, arm: str) -> int:
        """How many seeds of an arm are done."""

    def mean(self, arm: str, measure: str) -> float | None:
        """A measure's mean over the seeds of an arm; None where it is not known."""

    def values(self, arm: str, measure: str) -> list[float]:
        """The measure of every seed; empty where only the mean is known."""

    def gaps(self, arm: str, measure: str) -> list[float]:
        """The difference to the baseline of every seed that both have; empty where only the mean is known."""

    def difference(self, arm: str, measure: str) -> Difference | None:
        """The difference of an arm to the baseline; None where it is not known."""

    def change(self, first: str, second: str, measure: str) -> Difference | None:
        """The second arm minus the first, over the seeds that both have; None where it is not known."""


class Rows:
    """Numbers of one sweep from the rows of its cells."""

    def __init__(self, name: str, folder: Path, state: SweepState, results: dict[str, dict[str, float]]) -> None:
        self.name, self.folder, self.sweep, self.cells, self.results = name, folder, state.sweep, state.cells, results
        self.groups = grouped(state.cells, results)

    def arms(self) -> list[str]:
        names = [arm for arm in self.sweep.arms if any(group.arm == arm for group in self.groups)]
        return sorted(names, key=lambda arm: arm != self.sweep.baseline)

    def of(self, arm: str) -> dict[int, dict[str, float]]:
        """Results of an arm by seed. Raises UserError for a sweep with a grid, where an arm alone does not say which."""
        if self.sweep.grid:
            raise UserError(f"{self.name}: has a grid; only `sweep`, `differences` and `tasks` tables can show it")
        return self.groups.get(Group((), arm), {})

    def seeds(self, arm: str) -> int:
        return len(self.of(arm))

    def values(self, arm: str, measure: str) -> list[float]:
        return [row[measure] for row in self.of(arm).values() if measure in row]

    def mean(self, arm: str, measure: str) -> float | None:
        values = self.values(arm, measure)
        return statistics.fmean(values) if values else None

    def common(self, measure: str, arms: Sequence[str]) -> list[list[float]]:
        """A measure of these arms, for the seeds that all of them have."""
        rows = [self.of(arm) for arm in arms]
        shared = [seed for seed in self.sweep.seeds if all(measure in row.get(seed, {}) for row in rows)]
        return [[row[seed][measure] for seed in shared] for row in rows]

    def gaps(self, arm: str, measure: str) -> list[float]:
        base, values = self.common(measure, [self.sweep.baseline, arm])
        return [value - start for start, value in zip(base, values, strict=True)]

    def difference(self, arm: str, measure: str) -> Difference | None:
        return None if arm == self.sweep.baseline else self.change(self.sweep.baseline, arm, measure)

    def change(self, first: str, second: str, measure: str) -> Difference | None:
        before, after = self.common(measure, [first, second])
        result = paired([b - a for a, b in zip(before, after, strict=True)], self.sweep.equivalence)
        return Difference(result.pairs, result.mean, result.low, result.high) if result.pairs else None


class PageTables:
    """Numbers of one sweep from the tables of pages. Only means and intervals are there, with the digits of the tables."""

    def __init__(self, name: str, pages: Sequence[Path]) -> None:
        self.name = name
        blocks = [block for page in pages for block in BLOCK.findall(read_page(page))]
        self.tables = [(kind, table_of(body)) for _, kind, sweep, _, body, _ in blocks if sweep == name]
        if not any(kind == "sweep" for kind, _ in self.tables):
            raise UserError(f"{pages[0]}: has no table `<!-- sweep {name}: ... -->`, nor have the other pages")
        self.baseline = read_sweep(name)[1].baseline

    def rows(self, kind: str, arm: str) -> list[dict[str, str]]:
        return [row for found, rows in self.tables if found == kind for row in rows if row.get("arm") == arm]

    def arms(self) -> list[str]:
        (first, *_) = (rows for kind, rows in self.tables if kind == "sweep")
        without = read_sweep(self.name)[1].before
        return [row["arm"] for row in first if row["arm"] not in without]

    def seeds(self, arm: str) -> int:
        return next((int(row["seeds"]) for row in self.rows("sweep", arm) if "seeds" in row), 0)

    def mean(self, arm: str, measure: str) -> float | None:
        """From the sweep's table; else from a table of two arms; else the baseline's there plus the difference."""
        for row in self.rows("sweep", arm):
            if row.get(short(measure)):
                return float(row[short(measure)].split()[0])
        between = [row for kind, rows in self.tables if kind == "between" for row in rows]
        own = next((float(r[arm]) for r in between if r["measure"] == short(measure) and arm in r), None)
        if own is not None:
            return own
        base = self.baseline_mean(measure, between)
        difference = self.difference(arm, measure)
        if arm == self.baseline or base is None:
            return base
        return None if difference is None else base + difference.mean

    def baseline_mean(self, measure: str, between: Sequence[Mapping[str, str]]) -> float | None:
        """Of any arm with both: its value less its difference to the baseline."""
        for row in between:
            for arm in self.arms():
                difference = self.difference(arm, measure)
                if row["measure"] == short(measure) and arm in row and difference is not None:
                    return float(row[arm]) - difference.mean
        return None

    def values(self, arm: str, measure: str) -> list[float]:  # noqa: ARG002
        return []

    def gaps(self, arm: str, measure: str) -> list[float]:  # noqa: ARG002
        return []

    def change(self, first: str, second: str, measure: str) -> Difference | None:
        return self.difference(second, measure) if first == self.baseline else None

    def difference(self, arm: str, measure: str) -> Difference | None:
        if measure == "loss":
            cells = [row.get(f"difference to {self.baseline}", "") for row in self.rows("sweep", arm)]
        else:
            cells = [row.get(short(measure), "") for row in self.rows("differences", arm)]
        for cell in filter(None, cells):
            found = re.fullmatch(rf"{NUMBER}(?: \[{NUMBER}, {NUMBER}\])?(?: \(one seed\))?", cell)
            if found is None:
                raise UserError(f"{self.name}: {cell!r} is not a difference with an interval")
            mean, low, high = (float(text) if text else math.nan for text in found.groups())
            return Difference(self.seeds(arm), mean, low, high)
        return None


def read_page(page: Path) -> str:
    """The text of a page. Raises UserError when there is no such file."""
    if not page.is_file():
        raise UserError(f"{page}: there is no such page")
    return page.read_text(encoding="utf-8")


def table_of(body: str) -> list[dict[str, str]]:
    """Rows of a block's first table, by the titles of the columns."""
    lines = [line for line in body.splitlines() if line.startswith("|")]
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] or [[]]
    return [dict(zip(head, row, strict=True)) for row in rows[1:] if len(row) == len(head)]


def short(measure: str) -> str:
    """A measure's name as a column title."""
    return measure.partition("/")[2] if measure.startswith(("moe/", "inspect/")) else measure


def rows_of(name: str, folder: Path, cells: Path) -> Rows:
    """The rows of a sweep. folder: where its run directories would be. cells: the folder of the row files. Raises UserError
    for a row that was made with other settings or that was measured otherwise than the sweep's file asks."""
    state, results = SweepState(name, "", folder, [], 1), {}
    asked = measured(state.sweep)
    for cell, key in state.keys.items():
        path = cells / f"{cell}.json"
        if not path.exists():
            continue
        row = read_row(path)
        if row.key != key:
            raise UserError(
                f"{path}: was made with other settings than {name}.toml has, or by another version; delete it"
            )
        if row.measured != asked:
            differing = ", ".join(word for word in MEASURED if row.measured.get(word) != asked[word])
            raise UserError(
                f"{path}: was measured with another {differing}; run the sweep again, then --keep its directory"
            )
        results[cell] = row.result
    if not results:
        raise UserError(f"{cells}: has no row of the sweep {name}")
    return Rows(name, folder, state, results)


def find_rows(name: str, evidence: Path = EVIDENCE, sweeps: Path = SWEEPS) -> Rows | None:
    """The rows of a sweep in the repository, else of one that was run here; None where there are none. Raises UserError."""
    for cells in (evidence / name, sweeps / name / FOLDER):
        if next(cells.glob("*.json"), None) is not None:
            return rows_of(name, sweeps / name, cells)
    return None


def find_source(
    name: str, evidence: Path = EVIDENCE, sweeps: Path = SWEEPS, pages: Sequence[Path] = TABLE_PAGES
) -> Source:
    """Rows of a sweep, or else the tables of the pages. Raises UserError when there is neither."""
    return find_rows(name, evidence, sweeps) or PageTables(name, pages)


def keep_rows(folder: Path, name: str, evidence: Path = EVIDENCE) -> int:
    """Copies the rows of a sweep's directory into the repository, over older ones. Returns how many. Raises UserError."""
    cells = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    rows = rows_of(name, folder, cells)
    (evidence / name).mkdir(parents=True, exist_ok=True)
    for cell in rows.results:
        write_file(evidence / name / f"{cell}.json", (cells / f"{cell}.json").read_text(encoding="utf-8"))
    return len(rows.results)
