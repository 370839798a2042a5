"""The files of an evaluation: `RUN/eval/CHECKPOINT-TASKS.md`, `.csv` and `.json`. Does not import torch."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from titan_moe.checkpoint.state import Finite, Natural
from titan_moe.errors import UserError
from titan_moe.runtime.files import own_folder, write_file
from titan_moe.runtime.json_file import first_mistake, one_line, read_json

UNSAFE_CHARACTERS = re.compile(r"[^\w.-]")  # replaced in file names
LARGEST = 1 << 30  # bytes of a JSON file, which has every document's answers

Row = dict[str, Any]


class TaskRow(BaseModel):
    """One measure of one task."""

    task: str
    measure: str
    value: Finite
    standard_error: Finite | None = None
    chance: Finite | None = None
    documents: Natural | None = None


class _Result(BaseModel):
    """What is read of a JSON file, which may be a stranger's."""

    kind: Literal["tasks", "text"] = "text"
    step: Natural
    rows: list[Any]


class TaskResult(_Result):
    rows: list[TaskRow]


def result_file(run: Path, checkpoint: str, name: str) -> Path:
    """The JSON file with the results of a checkpoint, `step-00000500`, on the tasks `name`, joined by "-"."""
    stem = UNSAFE_CHARACTERS.sub("_", f"{checkpoint}-{name}")[:120]
    return run / "eval" / f"{stem}.json"


def write_results(checkpoint: Path, name: str, kind: str, rows: list[Row], details: dict[str, Any]) -> Path:
    """Writes rows as Markdown, CSV and JSON into `eval/` of the run directory; returns the Markdown file.

    kind: "tasks" or "text". details: what else the JSON file has."""
    run = checkpoint.absolute().parent.parent
    own_folder(run, "eval")
    path = result_file(run, checkpoint.name, name)
    table = io.StringIO()
    writer = csv.DictWriter(table, [*rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path.with_suffix(".csv"), table.getvalue())
    write_file(path.with_suffix(".md"), markdown(rows))
    content = {"checkpoint": str(checkpoint), "kind": kind, "rows": rows, **details}
    write_file(path, json.dumps(content, allow_nan=False, default=str))
    return path.with_suffix(".md")


def read_tasks(path: Path) -> TaskResult | None:
    """The results of a JSON file; None for results on texts. Raises UserError."""
    try:
        content = read_json(path, LARGEST)
        if _Result.model_validate(content).kind != "tasks":
            return None
        return TaskResult.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: damaged: {first_mistake(error)}; delete it and evaluate the run again") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {one_line(error)}; delete it and evaluate the run again") from error


def newest_results(run: Path) -> dict[tuple[str, str], tuple[int, TaskRow]]:
    """By task and measure: the step and the row of the newest evaluated checkpoint of a run directory.

    Of several rows of one step, that over the most documents. Raises UserError for a broken file."""
    newest: dict[tuple[str, str], tuple[int, TaskRow]] = {}
    found = [read_tasks(path) for path in sorted((run / "eval").glob("step-????????-*.json"))]
    for result in filter(None, found):
        for row in result.rows:
            key = (row.task, row.measure)
            known = newest.get(key)
            if known is None or (known[0], known[1].documents or 0) <= (result.step, row.documents or 0):
                newest[key] = (result.step, row)
    return newest


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.4f}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    titles = [*rows[0]]
    lines = [titles, ["---"] * len(titles), *([cell(one[title]) for title in titles] for one in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
