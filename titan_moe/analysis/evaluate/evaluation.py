"""Runs tasks through lm-evaluation-harness."""

import sys
import tempfile
from pathlib import Path

from titan_moe.analysis.evaluate.measures import Row, measures, scored_documents
from titan_moe.analysis.evaluate.tasks import UNSAFE, Task, resolved
from titan_moe.errors import UserError, pip_install
from titan_moe.generate.load import Loaded


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
