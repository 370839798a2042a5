"""Tasks of lm-evaluation-harness by name, with their data from the Hugging Face hub or from local files.

DIR/TASK/SPLIT.jsonl (or .json, .arrow)     SPLIT: validation, test, train or dev; rows as in the hub's data set
"""

import json
from pathlib import Path
from typing import NamedTuple

from titan_moe.errors import UserError

SUITES = {
    "zero-shot": ("boolq", "arc_easy", "arc_challenge", "truthfulqa_mc2", "piqa", "mmlu", "hellaswag"),
    "generative": ("gsm8k", "bbh", "mmlu_pro", "gpqa_diamond", "math_500"),
    "code": ("mbpp", "humaneval"),
}
NAMES = {"gpqa_diamond": "gpqa_diamond_generative_n_shot", "math_500": "minerva_math500"}
"""Our names to the harness's, where they differ."""
UNSAFE = ("mbpp", "humaneval")
"""Tasks whose measure runs the code that the model has written."""
FORMATS = {".jsonl": "json", ".json": "json", ".arrow": "arrow"}
SPLITS = ("validation", "test", "train", "dev")
PREFIX = "local_"


class Task(NamedTuple):
    name: str
    """As the user gave it, or a part of it: mmlu_anatomy."""
    harness: str
    """The harness's name."""
    local: bool


def named_tasks(text: str) -> list[str]:
    """Task names of a list with commas, suites written out. Raises UserError."""
    names: list[str] = []
    for word in filter(None, text.split(",")):
        names += SUITES.get(word, (word,))
    if not names:
        raise UserError(f"--tasks = {text!r}: names no task; give names with commas, or a suite: {', '.join(SUITES)}")
    return list(dict.fromkeys(names))


def check_code(names: list[str], unsafe_code: bool) -> None:
    """Raises UserError for tasks that run the model's code, unless that is allowed."""
    unsafe = [name for name in names if name in UNSAFE]
    if unsafe and not unsafe_code:
        raise UserError(
            f"--tasks: {', '.join(unsafe)} runs code that the model has written; give --unsafe-code if this machine may"
        )


def split_files(folder: Path) -> dict[str, Path]:
    """The data files of a task, by split."""
    found = {split: [folder / f"{split}{ending}" for ending in FORMATS] for split in SPLITS}
    there = {split: [path for path in paths if path.is_file()] for split, paths in found.items()}
    return {split: paths[0] for split, paths in there.items() if paths}


def local_task(name: str, folder: Path, definitions: dict[str, Path], output: Path) -> Task:
    """Writes the definition of a task on local files into `output`. Raises UserError.

    definitions: by the harness's name, the YAML files of its tasks."""
    files = split_files(folder)
    scored = next((split for split in ("test", "validation") if split in files), None)
    if scored is None:
        raise UserError(f"--data: {folder} has neither test nor validation, as .jsonl, .json or .arrow; add one")
    endings = {FORMATS[path.suffix] for path in files.values()}
    if len(endings) > 1:
        raise UserError(f"--data: {folder} has JSON and Arrow files; give one kind per task")
    harness = NAMES.get(name, name)
    if harness not in definitions:
        raise UserError(
            f"--tasks: {name!r} is no single task of the harness, so it can't read --data; see its task list"
        )
    task = f"{PREFIX}{harness}"
    fields: dict[str, object] = {
        "include": str(definitions[harness]),
        "task": task,
        "dataset_path": endings.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.absolute()) for split, path in files.items()}},
        "training_split": "train" if "train" in files else None,
        "validation_split": "validation" if "validation" in files else None,
        "test_split": "test" if "test" in files else None,
    }
    if "dev" in files:
        fields["fewshot_split"] = "dev"
    if harness == "boolq" and '"answer"' in first_row(files[scored]):
        fields["doc_to_target"] = "{{answer|int}}"  # the original data set has a truth value in place of a label
    # JSON is YAML.
    (output / f"{task}.yaml").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    return Task(name, task, local=True)


def first_row(path: Path) -> str:
    """The start of a data file, as text."""
    with path.open("rb") as file:
        return file.read(1 << 16).decode("utf-8", "replace") if path.suffix != ".arrow" else '"answer"'


def resolved(names: list[str], data: Path | None, definitions: dict[str, Path], output: Path) -> list[Task]:
    """Every task, on local files where `data` has a folder for it, else from the hub. Raises UserError."""
    tasks = []
    for name in names:
        folders = [] if data is None else [data / name]
        if name == "mmlu" and data is not None:
            folders = sorted(data.glob("mmlu_*"))
        there = [folder for folder in folders if folder.is_dir()]
        if there:
            tasks += [local_task(folder.name, folder, definitions, output) for folder in there]
        else:
            tasks.append(Task(name, NAMES.get(name, name), local=False))
    return tasks
