"""Runs tasks through lm-evaluation-harness."""

import contextlib
import functools
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from titan_moe.analysis.evaluate.measures import Row, measures, scored_documents, together
from titan_moe.analysis.evaluate.progress_bars import no_progress_bars
from titan_moe.analysis.evaluate.scores import Batches
from titan_moe.analysis.evaluate.tasks import CODE, HARNESS_FOLDERS, PROMPTS, Task, how_to_get, resolved
from titan_moe.errors import UserError, pip_install
from titan_moe.generate.load import Loaded
from titan_moe.parallel.mesh import Mesh
from titan_moe.runtime.optional import optional

BOOTSTRAP = 1000  # repetitions, for measures whose standard error has no formula
FIRST_SEED, SEED = 0, 1234  # of Python's random numbers, and of all others: the defaults of lm_eval.simple_evaluate


class LoadedTask(NamedTuple):
    task: Task
    objects: list[Any]
    """The harness's tasks, or a group of them, with their data."""


class TaskSet:
    """Tasks with their data, to be run on any model."""

    def __init__(self, names: Sequence[str], data: Path | None, mesh: Mesh, run_code: bool = False) -> None:
        """names: of `named_tasks`. A collective. Raises UserError when the package lm_eval is missing, or for a name that
        is no task; a task whose data is missing goes to `missing`."""
        self.harness = optional("lm_eval", "eval", "--tasks")
        folders = {HARNESS_FOLDERS.get(name, "mmlu" if name.startswith("mmlu_") else "") for name in names}
        self.manager = task_manager(tuple(sorted(folders)))
        self.tasks: list[LoadedTask] = []
        self.cut = 0
        """Texts of the latest run that were longer than the model's sequences."""
        self.missing: dict[str, str] = {}
        """By name, why a task can't be measured and how to get what is missing, in a line."""
        with fixed_random_numbers(), no_progress_bars():
            for name in names:
                self.load(name, data, mesh, run_code)
        for others, missing in gathered(([one.task for one in self.tasks], self.missing), mesh):
            self.tasks = [one for one in self.tasks if one.task in others]
            self.missing |= missing

    @property
    def found(self) -> set[str]:
        """The names of which at least one measure can be taken."""
        return {one.task.group for one in self.tasks}

    def load(self, name: str, data: Path | None, mesh: Mesh, run_code: bool) -> None:
        """Adds what a name stands for, with its data, and what is missing. Raises UserError for a name that is no task."""
        unreadable = (OSError, ValueError, AssertionError, optional("datasets.exceptions", "eval").DatasetsError)
        definitions = {name: entry.yaml_path for name, entry in self.manager.task_index.items() if entry.yaml_path}
        with tempfile.TemporaryDirectory() as folder:
            for task in resolved(name, data, definitions, Path(folder), run_code):
                if not task.local and task.harness not in self.manager.task_index:
                    raise UserError(
                        f"--tasks: no task {name!r} in lm-evaluation-harness; `lm-eval ls tasks` lists them"
                    )
                try:
                    if name in CODE and task.kind == "harness":
                        raise ValueError(f"there is no {name}/{PROMPTS}, from which its programs are made")
                    spec = str(Path(folder, f"{task.harness}.yaml")) if task.local else task.harness
                    found = self.manager.load([spec])
                except ImportError:
                    need = "needs sympy, math_verify, antlr4" if name == "math_500" else "needs more packages"
                    self.missing[name] = f"{name}: its measure {need}: {pip_install('lm-eval[math]')}"
                except unreadable as error:
                    self.missing[name] = how_to_get(name, reason(error))
                else:
                    check_possible(name, found["tasks"].values(), mesh)
                    groups = [group for group in found["groups"].values() if group.name == task.harness]
                    self.tasks.append(LoadedTask(task, groups or [*found["tasks"].values()]))

    def run(self, loaded: Loaded, batches: Batches, limit: int = 0) -> tuple[list[Row], list[Row]]:
        """A row per task and measure, and the answers to every document; both empty except on rank 0. A collective.

        limit: documents of each task; 0: all."""
        from titan_moe.analysis.evaluate.language_model import LanguageModel

        model = LanguageModel(loaded, batches)
        rows: list[Row] = []
        documents: list[Row] = []
        with fixed_random_numbers(), no_progress_bars():
            for group in dict.fromkeys(one.task.group for one in self.tasks):
                tasks = [one for one in self.tasks if one.task.group == group]
                found = self.evaluated(model, [item for one in tasks for item in one.objects], limit)
                if loaded.mesh.first:
                    rows += [{**row, "group": group} for row in measures(found, [one.task for one in tasks])]
                    documents += scored_documents(found)
        self.cut = model.cut
        return with_means(rows), documents

    def evaluated(self, model: Any, objects: list[Any], limit: int) -> Any:
        """What `lm_eval.simple_evaluate` finds for these tasks, with its seeds. That function also describes the environment,
        for which it starts pip and git, and git complains outside of a repository."""
        loaded = self.manager.load(objects)
        random.seed(FIRST_SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        return self.harness.evaluate(model, loaded, limit=limit or None, bootstrap_iters=BOOTSTRAP)


@functools.cache
def task_manager(folders: tuple[str, ...]) -> Any:
    """The harness's index of its definitions, of these of its folders; "": all of them."""
    tasks = optional("lm_eval.tasks", "eval", "--tasks")
    if "" in folders:
        return tasks.TaskManager()
    own = Path(tasks.__file__).parent
    return tasks.TaskManager(include_defaults=False, include_path=[str(own / folder) for folder in folders])


def with_means(rows: list[Row]) -> list[Row]:
    """The rows without their groups; where MMLU is one task per subject, before them its means over all documents."""
    mmlu = [row for row in rows if row["group"] == "mmlu"]
    means = [] if any(row["task"] == "mmlu" for row in mmlu) else together(mmlu, "mmlu")
    return [*means, *({key: value for key, value in row.items() if key != "group"} for row in rows)]


def check_possible(name: str, tasks: Iterable[Any], mesh: Mesh) -> None:
    """Raises UserError for a task that runs code by itself, and for one with generated text where the tokens of a text are
    spread over ranks."""
    tasks = [*tasks]
    if any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
        raise UserError(
            f"--tasks: {name}: runs code that the model has written without limits; take {' or '.join(CODE)}"
        )
    if mesh.degrees.tp * mesh.degrees.cp > 1 and any(task.OUTPUT_TYPE == "generate_until" for task in tasks):
        raise UserError(
            f"--tasks: {name}: the model writes text, one token at a time, which tp and cp can't spread over ranks; leave "
            "parallelism.tp and parallelism.cp at 1"
        )


def reason(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def gathered(value: Any, mesh: Mesh) -> list[Any]:
    """Every rank's value; a collective."""
    values = [value]
    if mesh.everyone is not None:
        values *= mesh.degrees.world
        dist.all_gather_object(values, value, group=mesh.everyone)
    return values


@contextlib.contextmanager
def fixed_random_numbers() -> Iterator[None]:
    """Some tasks shuffle choices, and the harness sets seeds: nothing outside of this block sees that."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
