"""The kinds of tables of the results pages, each from a sweep's numbers and the words of its comment (scripts/results.py)."""

import json
import math
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence

from results_sources import ROOT, Difference, Rows, Source, short
from scipy import stats

from titan_moe.analysis.sweep.grid import cell_name
from titan_moe.analysis.sweep.sequential import half_width
from titan_moe.analysis.sweep.statistics import CONFIDENCE, paired
from titan_moe.analysis.sweep.tables import EVAL, EVAL_CHANCE, EVAL_ERROR, comparisons, interval, line, markdown
from titan_moe.errors import UserError

RANKS = 8
MARGIN = 0.005  # of the tests of equality, whose p-values these tables do not show
MOST = 10_000  # seeds
POWER = 0.9

MEASURES = {
    "loss": "validation loss (nats)",
    "moe/overlap": "overlap of a token's experts (mean squared cosine)",
    "moe/topk_mass": "score mass on the chosen experts (top-k mass)",
    "moe/entropy": "routing entropy (nats)",
    "moe/max_vio": "busiest expert over the mean, minus 1 (max_vio)",
    "moe/dead": "fraction of experts without a token (dead)",
    "reg/lb": "load balance loss",
    "inspect/persistence_top1": "first choices kept from half of the training to its end (persistence)",
    "inspect/kappa": "paths from layer to layer (kappa)",
    "inspect/domain_information": "what the expert tells about the kind of text (nats)",
}
"""Measures in words."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(line, (head, ["---"] * len(head), *rows)))


def state_of(rows: Rows) -> str:
    """A sentence on cells that are missing; empty when all are done."""
    done, wanted = len(rows.results), len(rows.cells)
    if done == wanted:
        return ""
    begun = {group.arm for group in rows.groups}
    missing = [arm for arm in rows.sweep.arms if arm not in begun]
    none = f" No seed yet: {'; '.join(missing)}." if missing else ""
    text = f"{done} of {wanted} runs are done. Differences are over the seeds that both arms have.{none}"
    return f"\n\n{textwrap.fill(text, 120)}"


def sweep_table(rows: Rows, columns: Sequence[str]) -> str:
    """The tables that the sweep writes, with these columns, and its sentence on the learning rate."""
    groups = rows.groups
    compared = comparisons(
        {group: seeds for group, seeds in groups.items() if group.arm not in rows.sweep.before}, rows.sweep
    )
    lines: list[str] = []
    shown: list[int] | None = None
    tasks = False
    for text in markdown(rows.sweep, groups, compared).splitlines():
        if not text.startswith("|"):
            lines.append(text)
            shown, tasks = None, False
            continue
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        tasks = tasks or (shown is None and cells[0] == "task")
        if tasks:
            continue
        if shown is None:
            missing = next((column for column in columns if column not in cells), None)
            if missing is not None:
                raise UserError(f"{rows.name}: its table has no column {missing!r}; it has {', '.join(cells)}")
            shown = [cells.index(column) for column in columns]
        lines.append(line([cells[column] for column in shown]))
    return "\n".join(lines).strip() + state_of(rows)


def differences_table(rows: Rows, measures: Sequence[str]) -> str:
    """Every arm minus the baseline in these measures."""
    body = []
    for arm in rows.arms():
        found = [rows.difference(arm, measure) for measure in measures]
        pairs = max((one.pairs for one in found if one), default=0)
        if arm != rows.sweep.baseline:
            body.append([arm, str(pairs), *(written(one) for one in found)])
    return table(["arm", "seeds", *map(short, measures)], body)


def written(difference: Difference | None) -> str:
    if difference is None:
        return ""
    text = interval({"difference": difference.mean, "low": difference.low, "high": difference.high})
    return f"{text} (one seed)" if difference.pairs == 1 else text


def spread(values: Sequence[float]) -> str:
    """Mean and 95% interval of differences."""
    result = paired(list(values), MARGIN)
    return written(Difference(result.pairs, result.mean, result.low, result.high)) if values else "no pair"


def together_table(rows: Rows, words: Sequence[str]) -> str:
    """The effects of two arms, of both together, and their interaction."""
    first, second, both, *measures = words
    body = []
    for measure in measures:
        base, *arms = rows.common(measure, [rows.sweep.baseline, first, second, both])
        changes = [[b - a for a, b in zip(base, arm, strict=True)] for arm in arms]
        interaction = [c - a - b for a, b, c in zip(*changes, strict=True)]
        body.append([short(measure), str(len(base)), *map(spread, (*changes, interaction))])
    return table(["measure", "seeds", first, second, both, "beyond the sum"], body)


def between_table(rows: Rows, words: Sequence[str]) -> str:
    """The difference of two arms, neither of which is the baseline."""
    first, second, *measures = words
    body = []
    for measure in measures:
        before, after = rows.common(measure, [first, second])
        means = [f"{statistics.fmean(values):.4g}" if values else "" for values in (before, after)]
        change = spread([b - a for a, b in zip(before, after, strict=True)])
        body.append([short(measure), str(len(before)), *means, change])
    return table(["measure", "seeds", first, second, "difference"], body)


def placement_table(rows: Rows, arms: Sequence[str]) -> str:
    """Fraction of routed rows that cross ranks, on text that the placement was not fitted to. Needs checkpoints."""
    seed = rows.sweep.seeds[0]
    head, body = [], []
    for arm in arms:
        run = rows.folder / "runs" / cell_name(arm, (), seed)
        order = run / f"order-{RANKS}-ranks.json"
        if not order.exists():
            command = [sys.executable, "-m", "titan_moe.cli", "place", str(run), f"--ranks={RANKS}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        traffic = json.loads(order.read_text(encoding="utf-8"))["traffic"]
        head = ["arm", *traffic]
        cells = [f"{one['other']['share']:.3f} (load {one['other']['load']:.2f})" for one in traffic.values()]
        body.append([arm, *cells])
    return table(head, body)


def has_checkpoints(rows: Rows, arms: Sequence[str]) -> bool:
    """Whether the runs of `placement_table` are there."""
    return all((rows.folder / "runs" / cell_name(arm, (), rows.sweep.seeds[0])).is_dir() for arm in arms)


def tasks_table(rows: Rows, words: Sequence[str]) -> str:
    """Zero-shot results: a row for every task, measure and arm. words: the measures."""
    keys = {key for result in rows.results.values() for key in result if key.startswith(EVAL)}
    found = [key for key in keys if short_task(key)[1] in words]
    if not found:
        return "Not measured yet: no row has results on tasks."
    body = []
    for key in sorted(found, key=lambda key: (key.rpartition("/")[0], words.index(short_task(key)[1]))):
        task, measure = short_task(key)
        for arm in rows.arms():
            values = rows.values(arm, key)
            if not values:
                continue
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
            documents = rows.mean(arm, key.replace(EVAL, EVAL_ERROR, 1))
            chance = rows.mean(arm, key.replace(EVAL, EVAL_CHANCE, 1))
            numbers = [number(statistics.fmean(values)), number(error), number(documents), number(chance)]
            difference = "" if arm == rows.sweep.baseline else written(rows.difference(arm, key))
            body.append([task, measure, arm, str(len(values)), *numbers, difference])
    errors = ["standard error over seeds", "of one model over documents"]
    head = ["task", "measure", "arm", "seeds", "mean", *errors, "chance", f"difference to {rows.sweep.baseline}"]
    return table(head, body) + state_of(rows)


def short_task(key: str) -> tuple[str, str]:
    """Task and measure of a row's key."""
    task, _, measure = key.removeprefix(EVAL).rpartition("/")
    return task, measure


def number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def effects_table(source: Source, words: Sequence[str]) -> str:
    """What arms do: means, and differences to the baseline. words: the arms, and the measures after `|`."""
    arms, measures = split(words)
    baseline = source.arms()[0]
    here = [arm for arm in arms if source.seeds(arm)]
    body = []
    for measure in measures:
        digits = 4 if measure == "loss" else 3
        cells = [f"{value:.{digits}g}" if (value := source.mean(baseline, measure)) is not None else ""]
        for arm in here:
            value, change = source.mean(arm, measure), written(source.difference(arm, measure))
            cells.append(f"{value:.{digits}g}: {change}" if value is not None else change)
        body.append([MEASURES.get(measure, measure), *cells])
    counted = {arm: source.seeds(arm) for arm in (baseline, *here)}
    titles = [f"{arm} ({'one seed' if seeds == 1 else f'{seeds} seeds'})" for arm, seeds in counted.items()]
    return table(["measure", *titles], body)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before `|` and after it."""
    at = list(words).index("|")
    return list(words[:at]), list(words[at + 1 :])


def seeds_table(source: Source, margins: Sequence[str]) -> str:
    """How many seeds a difference of the loss takes, by the spread of the arms' differences to the baseline."""
    baseline = source.arms()[0]
    found = [source.difference(arm, "loss") for arm in source.arms() if arm != baseline]
    spreads = [one.deviation for one in found if one is not None and one.pairs > 1]
    if not spreads:
        return "No arm has two seeds."
    deviation = statistics.median(spreads)
    body = []
    for margin in map(float, margins):
        body.append([f"{margin:g}", *(seeds_for(test, deviation, margin) for test in (narrow, powerful, at_any_time))])
    head = [
        "difference (nats)",
        "95% interval within ± it",
        f"found with {POWER:.0%} power",
        "the same, looking after every seed",
    ]
    note = f"Median standard deviation of a paired difference: {deviation:.4f} nats ({min(spreads):.4f} to {max(spreads):.4f})."
    return f"{table(head, body)}\n\n{note}"


def seeds_for(enough: Callable[[int, float, float], bool], deviation: float, margin: float) -> str:
    """The smallest number of seeds, at least 2, that is enough."""
    return next((str(seeds) for seeds in range(2, MOST) if enough(seeds, deviation, margin)), f"over {MOST}")


def narrow(seeds: int, deviation: float, margin: float) -> bool:
    return float(stats.t(seeds - 1).ppf(0.5 + CONFIDENCE / 2)) * deviation / seeds**0.5 <= margin


def powerful(seeds: int, deviation: float, margin: float) -> bool:
    """Whether a two-sided t test finds a true difference of `margin` with probability POWER."""
    bound = float(stats.t(seeds - 1).ppf(0.5 + CONFIDENCE / 2))
    shifted = stats.nct(seeds - 1, margin / deviation * seeds**0.5)
    return float(shifted.sf(bound) + shifted.cdf(-bound)) >= POWER


def at_any_time(seeds: int, deviation: float, margin: float) -> bool:
    """Whether the interval that holds at all numbers of seeds excludes 0 with probability POWER."""
    width = half_width(seeds, 1.0, CONFIDENCE)
    if math.isinf(width):
        return False
    shifted = stats.nct(seeds - 1, margin / deviation * seeds**0.5)
    return float(shifted.sf(width * seeds**0.5)) >= POWER


def signs_table(source: Source, words: Sequence[str]) -> str:
    """Ranges of measures over the arms whose dead experts are below a fraction, and over the others. words: the fraction,
    and the measures."""
    limit, measures = float(words[0]), words[1:]
    sides: list[list[str]] = [[], []]
    for arm in source.arms():
        dead = source.mean(arm, "moe/dead")
        if dead is not None:
            sides[dead >= limit].append(arm)
    baseline = source.arms()[0]
    body = []
    for measure in measures:
        cells = []
        for arms in sides:
            values = [source.mean(arm, measure) for arm in arms]
            known = [value for value in values if value is not None]
            if measure == "loss":
                known = [one.mean for arm in arms if (one := source.difference(arm, measure)) is not None]
            cells.append(f"{min(known):.3g} to {max(known):.3g}" if known else "")
        title = f"{MEASURES[measure]}{f', difference to {baseline}' if measure == 'loss' else ''}"
        body.append([title, *cells])
    many = f"{len(sides[0])} arms with under {limit:.0%} of experts dead"
    return table(["measure", many, f"{len(sides[1])} arms with more: {'; '.join(sides[1])}"], body)


ROW_TABLES: dict[str, Callable[[Rows, Sequence[str]], str]] = {
    "sweep": sweep_table,
    "differences": differences_table,
    "together": together_table,
    "between": between_table,
    "placement": placement_table,
    "tasks": tasks_table,
}
"""Tables that need rows. Without them a page keeps what it has."""
DERIVED_TABLES: dict[str, Callable[[Source, Sequence[str]], str]] = {
    "effects": effects_table,
    "seeds": seeds_table,
    "signs": signs_table,
}
"""Tables that can also be made from the tables of the page of tables."""
