"""Runs tasks through lm-evaluation-harness, and writes what it measured."""

import csv
import io
import json
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_moe.analysis.evaluate.tasks import PREFIX, UNSAFE, Task, resolved
from titan_moe.errors import UserError, pip_install
from titan_moe.generate.load import Loaded
from titan_moe.runtime.files import own_folder, write_file

Row = dict[str, Any]
UNSAFE_CHARACTERS = re.compile(r"[^\w.-]")  # replaced in file names


def run_tasks(
    loaded: Loaded, names: list[str], data: Path | None, limit: int, batch_size: int
) -> tuple[list[Row], list[Row]]:
    """A row per task and measure, and the log-likelihoods of every document; both empty except on rank 0.

    Raises UserError when a package or a task's data is missing."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"--tasks: needs the package lm_eval ({pip_install('lm-eval')}); --text needs none") from None
    from titan_moe.analysis.evaluate.language_model import LanguageModel

    model, manager = LanguageModel(loaded, batch_size), TaskManager()
    rows: list[Row] = []
    documents: list[Row] = []
    definitions = {name: entry.yaml_path for name, entry in manager.task_index.items() if entry.yaml_path}
    with tempfile.TemporaryDirectory() as folder:
        for task in resolved(names, data, definitions, Path(folder)):
            if not task.local and task.harness not in manager.task_index:
                raise UserError(
                    f"--tasks: no task {task.name!r} in lm-evaluation-harness; `lm-eval ls tasks` lists them"
                )
            try:
                found = lm_eval.simple_evaluate(
                    model,
                    tasks=[str(Path(folder, f"{task.harness}.yaml")) if task.local else task.harness],
                    task_manager=manager,
                    limit=limit or None,
                    bootstrap_iters=1000,  # of measures whose standard error has no formula
                    confirm_run_unsafe_code=task.name in UNSAFE,
                )
            except (OSError, ImportError, ValueError) as error:
                raise missing(task, data, error) from error
            if found is not None:
                rows += measures(found, task)
                documents += scored_documents(found)
    if model.cut:
        print(f"{model.cut} texts were cut from the left to {model.max_length} tokens", file=sys.stderr)
    return rows, documents


def missing(task: Task, data: Path | None, error: Exception) -> UserError:
    """What a task could not be run for, in one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    where = f"{data / task.name} is no directory and " if data is not None and not task.local else ""
    source = "its files can't be read" if task.local else f"{where}its data set can't be read from the hub"
    return UserError(f"--tasks: {task.name}: {source} ({reason}); give --data=DIR with {task.name}/validation.jsonl")


def measures(found: dict[str, Any], task: Task) -> list[Row]:
    """Rows of task, measure, value, standard error and number of documents, from a result of the harness."""
    rows: list[Row] = []
    for name, values in found["results"].items():
        shown = name.removeprefix(PREFIX) if name != task.harness else task.name
        count = found["n-samples"].get(name, {}).get("effective", values.get("sample_len", ""))
        for key, value in values.items():
            measure, _, rule = key.partition(",")
            if not rule or measure.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = measure if rule == "none" else f"{measure} ({rule})"
            error = values.get(f"{measure}_stderr,{rule}")
            error = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            rows.append(row(shown, label, float(value), error, count))
        bits = [bits for sample in found["samples"].get(name, []) if (bits := gold_bits_per_byte(sample)) is not None]
        if bits and "mc2" not in name:  # TruthfulQA has several right answers
            rows.append(row(shown, "bits_per_byte", *mean_and_error(bits), len(bits)))
    return rows


def row(task: str, measure: str, value: float, error: float | None, documents: Any) -> Row:
    return {"task": task, "measure": measure, "value": value, "standard_error": error, "documents": documents}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def gold_bits_per_byte(sample: dict[str, Any]) -> float | None:
    """-log2 of the right answer's probability over its UTF-8 bytes; None for a task without one right choice."""
    gold, scores = sample["target"], sample["filtered_resps"]
    if isinstance(gold, str) and gold.isdigit():
        gold = int(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(scores) or not isinstance(scores[gold], list | tuple):
        return None
    answer = [*arguments(sample)][gold][1]
    return -float(scores[gold][0]) / math.log(2) / max(len(answer.encode("utf-8")), 1)


def arguments(sample: dict[str, Any]) -> list[Any]:
    """The (context, continuation) of each request of a document."""
    given = sample["arguments"]
    values = given.values() if isinstance(given, dict) else given
    return [[*one.values()] if isinstance(one, dict) else one for one in values]


def scored_documents(found: dict[str, Any]) -> list[Row]:
    """A row per document: its answers' log-likelihoods, or the generated text."""
    return [
        {"task": name.removeprefix(PREFIX), "document": sample["doc_id"], "responses": sample["filtered_resps"]}
        for name, samples in found["samples"].items()
        for sample in samples
    ]


def write_results(checkpoint: Path, name: str, rows: list[Row], details: dict[str, Any]) -> Path:
    """Writes rows as Markdown, CSV and JSON into `eval/` of the run directory; returns the Markdown file.

    details: what else the JSON file has."""
    folder = own_folder(checkpoint.absolute().parent.parent, "eval")
    stem = UNSAFE_CHARACTERS.sub("_", f"{checkpoint.name}-{name}")[:120]
    table = io.StringIO()
    writer = csv.DictWriter(table, [*rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(folder / f"{stem}.csv", table.getvalue())
    content = {"checkpoint": str(checkpoint), "rows": rows, **details}
    write_file(folder / f"{stem}.json", json.dumps(content, allow_nan=False, default=str))
    write_file(folder / f"{stem}.md", markdown(rows))
    return folder / f"{stem}.md"


def markdown(rows: list[Row]) -> str:
    """Rows as a Markdown table."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.4f}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    titles = [*rows[0]]
    lines = [titles, ["---"] * len(titles), *([cell(one[title]) for title in titles] for one in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
