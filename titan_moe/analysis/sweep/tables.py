"""A sweep's results: one row a cell, means over seeds, and paired differences to the baseline, as CSV and Markdown."""

import csv
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.analysis.sweep.grid import Cell, Sweep
from titan_moe.analysis.sweep.statistics import Paired, holm, paired
from titan_moe.checkpoint.run_dir import read_rows

TAIL = 0.1  # share of a run's steps, the last ones, over which its training measures are averaged
SHOWN = (
    "perplexity",
    "moe/overlap",
    "moe/topk_mass",
    "moe/entropy",
    "moe/max_vio",
    "moe/dead",
    "inspect/kappa",
    "inspect/cluster_agreement",
    "inspect/knn_overlap",
    "inspect/domain_information",
    "inspect/persistence_top1",
)
SIGNIFICANT = 0.05

Row = dict[str, Any]


class Group(NamedTuple):
    """One arm at one place of the grid."""

    place: tuple[str, ...]
    arm: str


def result_of(run: Path, validations: int) -> dict[str, float]:
    """A finished run's numbers: the mean of its last validations, of the last training steps' measures, and what `inspect`
    found. Raises ValueError for a run with fewer validations than that."""
    rows = read_rows(run / "metrics.jsonl")
    losses = [row for row in rows if row["kind"] == "validation"][-validations:]
    if len(losses) < validations:
        raise ValueError(f"{run.name} has {len(losses)} validations, not {validations}; lower validation.interval")
    found = {key: statistics.fmean(row[key] for row in losses) for key in ("loss", "bits_per_byte")}
    found["perplexity"] = math.exp(min(found["loss"], 700.0))
    steps = [row for row in rows if row["kind"] == "train"]
    tail = steps[-max(1, round(TAIL * len(steps))) :]
    for key in tail[-1]:
        if key.startswith(("moe/", "reg/")) or key == "ce":
            found[key] = statistics.fmean(row[key] for row in tail)
    newest = inspected(run, steps[-1]["step"])
    if newest.exists():
        summary = json.loads(newest.read_text(encoding="utf-8"))["summary"]
        found |= {f"inspect/{key}": value for key, value in summary.items()}
    return found


def inspected(run: Path, step: int) -> Path:
    """What `inspect` writes of a run's checkpoint."""
    return run / "inspect" / f"step-{step:08d}.json"


def grouped(cells: Iterable[Cell], results: dict[str, dict[str, float]]) -> dict[Group, dict[int, dict[str, float]]]:
    """Results by group and seed, in the order of the cells."""
    found: dict[Group, dict[int, dict[str, float]]] = {}
    for cell in cells:
        if cell.name in results:
            found.setdefault(Group(cell.place, cell.arm), {})[cell.seed] = results[cell.name]
    return found


def differences(groups: dict[Group, dict[int, dict[str, float]]], group: Group, baseline: str, key: str) -> list[float]:
    """Of a measure, seed by seed, to the baseline at the same place."""
    own, base = groups[group], groups.get(Group(group.place, baseline), {})
    return [own[seed][key] - base[seed][key] for seed in own if seed in base and key in own[seed] and key in base[seed]]


def comparisons(groups: dict[Group, dict[int, dict[str, float]]], sweep: Sweep) -> list[Row]:
    """Every measure of every arm against the baseline. p-values of the loss are Holm's over the arms of a place."""
    rows: list[Row] = []
    for place in dict.fromkeys(group.place for group in groups):
        arms = [group for group in groups if group.place == place and group.arm != sweep.baseline]
        losses = [paired(differences(groups, group, sweep.baseline, "loss"), sweep.equivalence) for group in arms]
        for group, loss, p in zip(arms, losses, holm([loss.p for loss in losses]), strict=True):
            for key in next(iter(groups[group].values())):
                found = paired(differences(groups, group, sweep.baseline, key), sweep.equivalence)
                row: Row = {**dict(zip(sweep.grid, place, strict=True)), "arm": group.arm, "measure": key}
                row |= {"pairs": found.pairs, "difference": found.mean, "low": found.low, "high": found.high}
                if key == "loss":
                    row |= {"p": found.p, "p_holm": p, "p_equivalent": found.p_equivalent}
                    row["verdict"] = verdict(loss, p)
                rows.append(row)
    return rows


def verdict(loss: Paired, p: float) -> str:
    """In a word, what the paired differences of the loss say."""
    if loss.pairs < 2:
        return "too few pairs"
    if p < SIGNIFICANT:
        return "lower" if loss.mean < 0 else "higher"
    return "no difference" if loss.p_equivalent < SIGNIFICANT else "cannot tell"


def write_tables(folder: Path, sweep: Sweep, cells: Sequence[Cell], results: dict[str, dict[str, float]]) -> None:
    """results.csv (a row a cell), comparisons.csv and results.md."""
    groups = grouped(cells, results)
    rows = [
        {**dict(zip(sweep.grid, cell.place, strict=True)), "arm": cell.arm, "seed": cell.seed, **results[cell.name]}
        for cell in cells
        if cell.name in results
    ]
    write_csv(folder / "results.csv", rows)
    compared = comparisons({g: v for g, v in groups.items() if g.arm not in sweep.before}, sweep)
    write_csv(folder / "comparisons.csv", compared)
    fresh = folder / ".results.md"
    fresh.write_text(markdown(sweep, groups, compared), encoding="utf-8")
    fresh.replace(folder / "results.md")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Columns in the order in which they first appear."""
    fresh = path.with_name(f".{path.name}")
    with fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    fresh.replace(path)


def markdown(sweep: Sweep, groups: dict[Group, dict[int, dict[str, float]]], compared: Sequence[Row]) -> str:
    """Means and deviations over seeds, and the comparisons, a table for every place of the grid."""
    lines: list[str] = []
    for place in dict.fromkeys(group.place for group in groups):
        if place:
            lines += [f"### {', '.join(f'{axis} {value}' for axis, value in zip(sweep.grid, place, strict=True))}", ""]
        here = {group: found for group, found in groups.items() if group.place == place}
        shown = [key for key in SHOWN if any(key in row for found in here.values() for row in found.values())]
        names = [key.partition("/")[2] or key for key in shown]
        head = ["arm", "seeds", "loss", f"difference to {sweep.baseline}", "verdict", *names]
        table = []
        for group, found in here.items():
            row = next(
                (
                    row
                    for row in compared
                    if row["measure"] == "loss" and row["arm"] == group.arm and at(row, sweep) == place
                ),
                None,
            )
            values = {key: [r[key] for r in found.values() if key in r] for key in ("loss", *shown)}
            table.append(
                [
                    group.arm,
                    str(len(found)),
                    spread(values["loss"]),
                    interval(row) if row else "",
                    f"{row['verdict']}{p_values(row)}" if row else "",
                    *(spread(values[key]) for key in shown),
                ]
            )
        lines += [line(head), line(["---"] * len(head)), *map(line, table), ""]
    return "\n".join(lines)


def at(row: Row, sweep: Sweep) -> tuple[str, ...]:
    return tuple(row[axis] for axis in sweep.grid)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean:.4g}" if len(values) == 1 else f"{mean:.4g} ± {statistics.stdev(values):.2g}"


def interval(row: Row) -> str:
    if math.isnan(row["low"]):
        return f"{row['difference']:+.4f}"
    return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


def p_values(row: Row) -> str:
    if math.isnan(row["p"]):
        return ""
    return f" (p {row['p_holm']:.2g}, equivalent {row['p_equivalent']:.2g})"
