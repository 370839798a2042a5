"""Fills the tables of docs/results.md from its sweeps. The text between them is written by hand.

    python scripts/results.py [--sweeps runs/sweeps]     # after the sweeps; the page gives their commands

A table is between a comment and `<!-- end -->`. The comments:

    <!-- sweep NAME: column; ... -->            the sweep's own tables, with these columns
    <!-- differences NAME: measure; ... -->     every arm minus the baseline, paired by seed, with 95% intervals
    <!-- together NAME: a; b; both; measure ... -->   interaction of a and b: (both - baseline) - (a - baseline)
                                                - (b - baseline), paired by seed
    <!-- between NAME: a; b; measure ... -->    arm b minus arm a, paired by seed
    <!-- placement NAME: arm; ... -->           traffic of experts placed on eight ranks, for the first seed of those arms
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_moe.analysis.sweep.grid import read_sweep
from titan_moe.analysis.sweep.statistics import paired
from titan_moe.analysis.sweep.tables import interval, line

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
RANKS = 8
BLOCK = re.compile(
    r"(<!-- (sweep|differences|together|between|placement) (\w+): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL
)


def sweep_table(folder: Path, columns: Sequence[str]) -> str:
    """The sweep's own tables, with these columns only."""
    lines, columns_shown = [], None
    for row in (folder / "results.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")] if row.startswith("|") else None
        if cells is None:
            lines.append(row)
            columns_shown = None
            continue
        if columns_shown is None:
            missing = [column for column in columns if column not in cells]
            if missing:
                sys.exit(f"{folder / 'results.md'} has no column {missing[0]!r}; it has {', '.join(cells)}")
            columns_shown = [cells.index(column) for column in columns]
        lines.append(line([cells[column] for column in columns_shown]))
    return "\n".join(lines).strip()


def differences_table(folder: Path, measures: Sequence[str]) -> str:
    """Differences of every arm to the baseline in these measures."""
    by_arm: dict[str, dict[str, str]] = {}
    with (folder / "comparisons.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {key: float(row[key]) for key in ("difference", "low", "high")}
            by_arm.setdefault(row["arm"], {})[row["measure"]] = interval(numbers)
    rows = [[arm, *(values[measure] for measure in measures)] for arm, values in by_arm.items()]
    return table(["arm", *map(short, measures)], rows)


def together_table(folder: Path, words: Sequence[str]) -> str:
    """The effects of two arms, of both together, and their interaction."""
    first, second, both, *measures = words
    baseline = read_sweep(folder.name)[1].baseline
    rows = []
    for measure in measures:
        values = values_of(folder, measure, [baseline, first, second, both])
        changes = [[b - a for a, b in zip(values[0], arm, strict=True)] for arm in values[1:]]
        interaction = [c - a - b for a, b, c in zip(*changes, strict=True)]
        rows.append([short(measure), *map(spread, (*changes, interaction))])
    return table(["measure", first, second, both, "beyond the sum"], rows)


def between_table(folder: Path, words: Sequence[str]) -> str:
    """The difference of two arms, neither of which is the baseline."""
    first, second, *measures = words
    rows = []
    for measure in measures:
        before, after = values_of(folder, measure, [first, second])
        means = [f"{sum(values) / len(values):.4g}" for values in (before, after)]
        rows.append([short(measure), *means, spread([b - a for a, b in zip(before, after, strict=True)])])
    return table(["measure", first, second, "difference"], rows)


def values_of(folder: Path, measure: str, arms: Sequence[str]) -> list[list[float]]:
    """A measure of these arms, for the seeds of the last arm."""
    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    value_of = {(row["arm"], row["seed"]): float(row[measure]) for row in rows if row[measure]}
    seeds = [row["seed"] for row in rows if row["arm"] == arms[-1]]
    return [[value_of[arm, seed] for seed in seeds] for arm in arms]


def spread(differences: Sequence[float]) -> str:
    """Mean and 95% interval."""
    result = paired(list(differences), 0.005)
    return interval({"difference": result.mean, "low": result.low, "high": result.high})


def short(measure: str) -> str:
    """A measure's name as a column title."""
    return measure.partition("/")[2] if measure.startswith(("moe/", "inspect/")) else measure


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(line, (head, ["---"] * len(head), *rows)))


def placement_table(folder: Path, arms: Sequence[str]) -> str:
    """Fraction of routed rows that cross ranks, on text that the placement was not fitted to."""
    with (folder / "results.csv").open(encoding="utf-8") as file:
        seed = next(csv.DictReader(file))["seed"]
    head, rows = [], []
    for arm in arms:
        run = folder / "runs" / f"{arm.replace(' ', '_')}--seed{seed}"
        order = run / f"order-{RANKS}-ranks.json"
        if not order.exists():
            command = [sys.executable, "-m", "titan_moe.cli", "place", str(run), f"--ranks={RANKS}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        traffic = json.loads(order.read_text(encoding="utf-8"))["traffic"]
        head = ["arm", *traffic]
        cells = [f"{one['other']['share']:.3f} (load {one['other']['load']:.2f})" for one in traffic.values()]
        rows.append([arm, *cells])
    return table(head, rows)


TABLES = {
    "sweep": sweep_table,
    "differences": differences_table,
    "together": together_table,
    "between": between_table,
    "placement": placement_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=Path, default=Path("runs") / "sweeps")
    options = parser.parse_args()

    def filled(block: re.Match[str]) -> str:
        opening, kind, name, words, end = block.groups()
        if not (options.sweeps / name / "results.md").exists():
            sys.exit(f"{options.sweeps / name}: no results; run `titan-moe sweep --config {name}` first")
        parts = [part.strip() for part in words.split(";")]
        return f"{opening}{TABLES[kind](options.sweeps / name, parts)}\n{end}"

    PAGE.write_text(BLOCK.sub(filled, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
