"""A sweep's results as CSV and Markdown: a row per cell, means over seeds, paired differences to the baseline."""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.analysis.evaluate.results import newest_results, result_file
from titan_moe.analysis.evaluate.tasks import named_tasks
from titan_moe.analysis.sweep.grid import Cell, Sweep
from titan_moe.analysis.sweep.sequential import MOST_SEEDS, Anytime, anytime, decision, seeds_needed
from titan_moe.analysis.sweep.statistics import CONFIDENCE, Paired, holm, paired
from titan_moe.checkpoint.run_dir import read_rows
from titan_moe.runtime.files import write_file

TAIL = 0.1  # fraction of a run's steps, at its end, over which training measures are averaged
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
EVAL = "eval/"  # before the names of tasks and their measures
EVAL_ERROR = "eval_error/"  # before the same: standard errors over documents
EVAL_CHANCE = "eval_chance/"  # and what guessing gives
SIGNIFICANT = 0.05
FORMULA = ("=", "+", "-", "@", "\t", "\r")

Row = dict[str, Any]


class Group(NamedTuple):
    """One arm at one point of the grid."""

    grid_point: tuple[str, ...]
    arm: str


def result_of(run: Path, validations: int) -> dict[str, float]:
    """Numbers of a finished run: means of its last `validations` validations and of its last training steps, the summary
    of `inspect` and the measures of `eval`. Raises ValueError when it has fewer validations."""
    rows = read_rows(run / "metrics.jsonl")
    losses = [row for row in rows if row["kind"] == "validation"][-validations:]
    if len(losses) < validations:
        raise ValueError(f"{run.name} has {len(losses)} validations, not {validations}; lower validation.interval")
    result = {key: statistics.fmean(row[key] for row in losses) for key in ("loss", "bits_per_byte")}
    result["perplexity"] = math.exp(min(result["loss"], 700.0))
    steps = [row for row in rows if row["kind"] == "train"]
    tail = steps[-max(1, round(TAIL * len(steps))) :]
    for key in tail[-1]:
        if key.startswith(("moe/", "reg/")) or key == "ce":
            result[key] = statistics.fmean(row[key] for row in tail)
    newest = inspected(run, steps[-1]["step"])
    if newest.exists():
        summary = json.loads(newest.read_text(encoding="utf-8"))["summary"]
        result |= {f"inspect/{key}": value for key, value in summary.items()}
    for (task, measure), (step, row) in newest_results(run).items():
        if step == steps[-1]["step"]:
            numbers = {EVAL: row.value, EVAL_ERROR: row.standard_error, EVAL_CHANCE: row.chance}
            result |= {f"{kind}{task}/{measure}": value for kind, value in numbers.items() if value is not None}
    return result


def inspected(run: Path, step: int) -> Path:
    """The file that `inspect` writes for a run's checkpoint of that step."""
    return run / "inspect" / f"step-{step:08d}.json"


def evaluated(run: Path, step: int, tasks: str) -> Path:
    """The file that `eval` writes for a run's checkpoint of that step. tasks: as in `--tasks`. Raises UserError."""
    return result_file(run, f"step-{step:08d}", "-".join(named_tasks(tasks)))


def grouped(cells: Iterable[Cell], results: dict[str, dict[str, float]]) -> dict[Group, dict[int, dict[str, float]]]:
    """Results by group and seed, in the order of the cells."""
    groups: dict[Group, dict[int, dict[str, float]]] = {}
    for cell in cells:
        if cell.name in results:
            groups.setdefault(Group(cell.grid_point, cell.arm), {})[cell.seed] = results[cell.name]
    return groups


def differences(groups: dict[Group, dict[int, dict[str, float]]], group: Group, baseline: str, key: str) -> list[float]:
    """Differences of a measure to the baseline at the same grid point, seed by seed."""
    ours, base = groups[group], groups.get(Group(group.grid_point, baseline), {})
    return [
        ours[seed][key] - base[seed][key] for seed in ours if seed in base and key in ours[seed] and key in base[seed]
    ]


def while_running(groups: dict[Group, dict[int, dict[str, float]]], group: Group, sweep: Sweep) -> Anytime:
    """An arm's difference of loss to the baseline, with an interval that may be looked at after every seed.

    The confidence is divided among the arms of a grid point, so that all their intervals hold together with CONFIDENCE."""
    gaps = differences(groups, group, sweep.baseline, "loss") if group in groups else []
    return anytime(gaps, joint_confidence(sweep))


def joint_confidence(sweep: Sweep) -> float:
    """The confidence of one arm's interval, for all intervals of a grid point to hold with CONFIDENCE (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, len(sweep.arms) - 1)


def anytime_columns(result: Anytime, sweep: Sweep) -> tuple[str, str, str]:
    """Difference, interval with what it says, and the number of further seeds that would narrow it to the sweep's margin."""
    if not result.pairs:
        return "", "", ""
    word = decision(result, sweep.equivalence)
    low, high = (f"{end:+.4f}" if math.isfinite(end) else "any" for end in (result.low, result.high))
    more = seeds_needed(result, sweep.equivalence, joint_confidence(sweep))
    many = "" if result.pairs < 2 else f"over {MOST_SEEDS}" if more is None else str(more)
    return f"{result.mean:+.4f}", word if result.pairs < 2 else f"[{low}, {high}] {word}", many


def comparisons(groups: dict[Group, dict[int, dict[str, float]]], sweep: Sweep) -> list[Row]:
    """Every measure of every arm against the baseline. The loss's p-values are Holm-adjusted over the arms of a grid
    point."""
    rows: list[Row] = []
    for grid_point in dict.fromkeys(group.grid_point for group in groups):
        arms = [group for group in groups if group.grid_point == grid_point and group.arm != sweep.baseline]
        losses = [paired(differences(groups, group, sweep.baseline, "loss"), sweep.equivalence) for group in arms]
        for group, loss, p in zip(arms, losses, holm([loss.p for loss in losses]), strict=True):
            for key in next(iter(groups[group].values())):
                if key.startswith((EVAL_ERROR, EVAL_CHANCE)):
                    continue
                result = paired(differences(groups, group, sweep.baseline, key), sweep.equivalence)
                row: Row = {**dict(zip(sweep.grid, grid_point, strict=True)), "arm": group.arm, "measure": key}
                row |= {"pairs": result.pairs, "difference": result.mean, "low": result.low, "high": result.high}
                if key == "loss":
                    row |= {"p": result.p, "p_holm": p, "p_equivalent": result.p_equivalent}
                    row["verdict"] = verdict(loss, p)
                rows.append(row)
    return rows


def verdict(loss: Paired, p: float) -> str:
    """The outcome of the tests on the loss, in words. p: Holm-adjusted."""
    if loss.pairs < 2:
        return "one seed" if loss.pairs else "no pair"
    if p < SIGNIFICANT:
        return "lower" if loss.mean < 0 else "higher"
    return "no difference" if loss.p_equivalent < SIGNIFICANT else "cannot tell"


def write_tables(folder: Path, sweep: Sweep, cells: Sequence[Cell], results: dict[str, dict[str, float]]) -> None:
    """Writes results.csv (a row per cell), comparisons.csv and results.md, each atomically."""
    groups = grouped(cells, results)
    rows = [
        {
            **dict(zip(sweep.grid, cell.grid_point, strict=True)),
            "arm": cell.arm,
            "seed": cell.seed,
            **results[cell.name],
        }
        for cell in cells
        if cell.name in results
    ]
    write_csv(folder / "results.csv", rows)
    compared = comparisons({g: v for g, v in groups.items() if g.arm not in sweep.before}, sweep)
    write_csv(folder / "comparisons.csv", compared)
    write_file(folder / "results.md", markdown(sweep, groups, compared))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV, completely or not at all, with columns in the order in which they first appear."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: inert(cell) for key, cell in row.items()} for row in rows)
    write_file(path, text.getvalue())


def inert(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets a quotation mark in front."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def markdown(sweep: Sweep, groups: dict[Group, dict[int, dict[str, float]]], compared: Sequence[Row]) -> str:
    """One table per grid point: means and standard deviations over seeds, and comparisons with the baseline."""
    lines: list[str] = []
    for grid_point in dict.fromkeys(group.grid_point for group in groups):
        if grid_point:
            lines += [
                f"### {', '.join(f'{axis} {value}' for axis, value in zip(sweep.grid, grid_point, strict=True))}",
                "",
            ]
        here = {group: seeds for group, seeds in groups.items() if group.grid_point == grid_point}
        shown = [key for key in SHOWN if any(key in row for seeds in here.values() for row in seeds.values())]
        names = [key.partition("/")[2] or key for key in shown]
        running = ("interval at any time", f"more seeds for ±{sweep.equivalence:g}")
        head = ["arm", "seeds", "loss", f"difference to {sweep.baseline}", "verdict", *running, *names]
        table = []
        for group, seeds in here.items():
            row = next(
                (
                    row
                    for row in compared
                    if row["measure"] == "loss" and row["arm"] == group.arm and grid_point_of(row, sweep) == grid_point
                ),
                None,
            )
            values = {key: [r[key] for r in seeds.values() if key in r] for key in ("loss", *shown)}
            table.append(
                [
                    group.arm,
                    str(len(seeds)),
                    spread(values["loss"]),
                    interval(row) if row else "",
                    f"{row['verdict']}{p_values(row)}" if row else "",
                    *(anytime_columns(while_running(groups, group, sweep), sweep)[1:] if row else ("", "")),
                    *(spread(values[key]) for key in shown),
                ]
            )
        lines += [line(head), line(["---"] * len(head)), *map(line, table), ""]
        lines += task_table(sweep, here, compared)
    rate = sweep.learning_rate or "of the configuration; the sweep's file does not say how it was chosen"
    return "\n".join([*lines, f"Learning rate: {rate}.", ""])


def task_table(sweep: Sweep, groups: dict[Group, dict[int, dict[str, float]]], compared: Sequence[Row]) -> list[str]:
    """The lines of the table of one grid point's tasks: a row for every measure and arm; none without evaluations."""
    measures = dict.fromkeys(key for seeds in groups.values() for row in seeds.values() for key in row)
    rows = []
    for key in (key for key in measures if key.startswith(EVAL)):
        for group, seeds in groups.items():
            values = [row[key] for row in seeds.values() if key in row]
            if not values:
                continue
            to_base = (
                row
                for row in compared
                if (row["measure"], row["arm"], grid_point_of(row, sweep)) == (key, group.arm, group.grid_point)
            )
            difference = next((interval(row) for row in to_base if row["pairs"]), "")
            task, _, measure = key.removeprefix(EVAL).rpartition("/")
            rows.append([task, measure, group.arm, str(len(values)), spread(values), difference])
    head = ["task", "measure", "arm", "seeds", "value", f"difference to {sweep.baseline}"]
    return [line(head), line(["---"] * len(head)), *map(line, rows), ""] if rows else []


def grid_point_of(row: Row, sweep: Sweep) -> tuple[str, ...]:
    return tuple(row[axis] for axis in sweep.grid)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
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
