"""Writes one self-contained HTML page about one or several runs; every plot also as PNG, its numbers as CSV."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from titan_moe import __version__
from titan_moe.analysis.evaluate.results import TaskRow
from titan_moe.analysis.report.figures import plots
from titan_moe.analysis.report.runs import Run, read_runs
from titan_moe.analysis.sweep.statistics import paired
from titan_moe.analysis.sweep.tables import write_csv
from titan_moe.errors import UserError
from titan_moe.runtime.files import own_folder, write_file

BLOCKS = 10  # of paired steps; their means are treated as independent samples
SUMMARY = {
    "entropy": "routing entropy",
    "topk_mass": "top-k mass",
    "margin": "margin",
    "overlap": "overlap",
    "overlap_chance": "overlap, chance level",
    "overlap_y": "overlap y",
    "load_variation": "load: standard deviation / mean",
    "max_vio_global": "max_vio, over the text",
    "kappa": "kappa",
    "kappa_chance": "kappa, chance level",
    "cluster_agreement": "cluster agreement",
    "silhouette": "silhouette",
    "knn_overlap": "neighbours with another expert",
    "domain_information": "I(expert; domain)",
    "persistence_top1": "persistence, first choice",
    "persistence_topk": "persistence, all choices",
}
EXAMPLE_LAYERS = 64

Row = dict[str, Any]


def write_report(paths: Sequence[Path], folder: Path) -> Path:
    """Reads run directories and writes the page and its files into `folder`; returns the page. Raises UserError."""
    runs = read_runs(paths)
    if folder.parent in paths:
        own_folder(folder.parent, folder.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output = {str(folder)!r}: can't be written: {error.strerror}; name another one") from error
    sections = []
    for title, drawn in plots(runs):
        for plot in drawn:
            write_file(folder / f"{plot.name}.png", plot.png)
            write_csv(folder / f"{plot.name}.csv", plot.rows)
        shown = [plot._replace(svg=Markup(plot.svg)) for plot in drawn if plot.rows]
        if shown:
            sections.append((title, shown))
    compared = [row for run in runs[1:] for row in differences(runs[0], run)]
    if compared:
        write_csv(folder / "differences.csv", compared)
    tasks = task_rows(runs)
    if tasks:
        write_csv(folder / "tasks.csv", tasks)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("titan_moe.analysis.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        runs=runs,
        facts=[facts(run) for run in runs],
        sections=sections,
        compared=compared,
        tasks=task_table(runs),
        summary=summary(runs),
        examples=[(run.name, examples(run)) for run in runs if run.inspections],
        missing=[run for run in runs if not run.inspections],
        version=__version__,
    )
    path = folder / "index.html"
    write_file(path, page)
    return path


def facts(run: Run) -> dict[str, str]:
    """The table at the top of the page: a run's settings and results."""
    config, last = run.config, run.rows("train")[-1]
    moe, model = config.model.moe, config.model
    validations = run.rows("validation")
    shape = {
        "model": f"{model.layers} layers, width {model.dim}",
        "experts": f"{moe.experts} of width {moe.hidden_dim}, {moe.top_k} per token",
    }
    if config.base:
        trained = f"adapters of rank {config.lora.rank}" if config.lora.rank else "all parameters"
        shape = {"model": config.base, "fine-tuned": trained}
    result = {
        "run": run.name,
        **shape,
        "weights": ", ".join(f"{name} {weight:g}" for name, weight in config.weights.items() if weight) or "none",
        "balancing bias": f"rate {config.balancer.rate:g}" if config.balancer.rate else "off",
        "text": ", ".join([config.data.corpus] if isinstance(config.data.corpus, str) else config.data.corpus),
        "seed": str(config.job.seed),
        "steps": f"{last['step']:,} of {config.training.steps:,}" if config.training.steps else f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "training loss": f"{last['ce']:.4f}",
    }
    if validations:
        latest = validations[-1]
        result["validation loss"] = f"{latest['loss']:.4f}"
        result["perplexity"] = f"{latest['perplexity']:.2f}"
        result["bits per byte"] = f"{latest['bits_per_byte']:.4f}"
    return result


def summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Means over layers at the newest inspected checkpoint: (title, a value per run)."""
    inspected = [run for run in runs if run.inspections]
    table = []
    for key, title in SUMMARY.items():
        values = [run.newest["summary"].get(key) for run in inspected]
        if any(value is not None for value in values):
            table.append((title, ["" if value is None else f"{value:.4g}" for value in values]))
    return [("step", [f"{run.newest['step']:,}" for run in inspected]), *table] if inspected else []


def task_rows(runs: Sequence[Run]) -> list[Row]:
    """Every run's results of `titan-moe eval`, a row per run, task and measure."""
    return [
        {"run": run.name, "step": step, **row.model_dump()} for run in runs for step, row in run.evaluations.values()
    ]


def task_table(runs: Sequence[Run]) -> list[tuple[str, str, str, list[str]]]:
    """The results of `titan-moe eval` side by side: (task, measure, chance level, a cell per run)."""
    table = []
    for task, measure in dict.fromkeys(key for run in runs for key in run.evaluations):
        found = [run.evaluations.get((task, measure)) for run in runs]
        chance = next((one[1].chance for one in found if one is not None and one[1].chance is not None), None)
        table.append((task, measure, "" if chance is None else f"{chance:.4f}", [task_cell(one) for one in found]))
    return table


def task_cell(found: tuple[int, TaskRow] | None) -> str:
    """A result with its standard error, the documents and the step of the checkpoint."""
    if found is None:
        return ""
    step, row = found
    error = "" if row.standard_error is None else f" ± {row.standard_error:.4f}"
    documents = "" if row.documents is None else f"{row.documents:,} documents, "
    return f"{row.value:.4f}{error} ({documents}step {step:,})"


def differences(first: Run, other: Run) -> list[Row]:
    """Differences of two runs in every measure that both log, and in the last validation loss.

    Means of the differences at equal steps, over the second half of the steps that both have. The 95% interval comes
    from the means of BLOCKS blocks of steps."""
    rows: list[Row] = []
    a, b = ({row["step"]: row for row in run.rows("train")} for run in (first, other))
    steps = sorted(a.keys() & b.keys())
    steps = steps[len(steps) // 2 :]
    names = [key for key in a[steps[-1]] if key == "ce" or key.startswith(("reg/", "moe/"))] if steps else []
    for key in names:
        if not all(key in rows_of_run[step] for rows_of_run in (a, b) for step in steps):
            continue
        gaps = [b[step][key] - a[step][key] for step in steps]
        blocks = [float(block.mean()) for block in np.array_split(np.array(gaps), min(BLOCKS, len(gaps)))]
        difference = paired(blocks, margin=0.0)
        rows.append(
            {
                "run": other.name,
                "measure": key,
                "first": statistics.fmean(a[step][key] for step in steps),
                "other": statistics.fmean(b[step][key] for step in steps),
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
            }
        )
    ends = [run.rows("validation")[-1:] for run in (first, other)]
    if all(ends):
        values = [end[0]["loss"] for end in ends]
        rows.append(
            {
                "run": other.name,
                "measure": "last validation loss",
                "first": values[0],
                "other": values[1],
                "difference": values[1] - values[0],
                "low": "",
                "high": "",
            }
        )
    return rows


def examples(run: Run) -> list[list[list[list[str]]]]:
    """By layer and expert: (text before it, token) of the tokens with the largest gates."""
    return [layer.get("examples", []) for layer in run.newest["layers"][:EXAMPLE_LAYERS]]
