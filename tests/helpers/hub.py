"""A copy of a data set of the Hugging Face hub on this machine, as `datasets` streams it: one file per part, compressed."""

import gzip
import json
import random
from pathlib import Path

README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""
WORDS = "quick brown fox jumps over lazy dogs and routers send tokens to experts which multiply them".split()  # noqa: SIM905


def make_c4(folder: Path, documents: int, files: int = 3, validation: int = 60) -> list[str]:
    """Makes folder/allenai/c4, which `datasets` reads in place of the hub's in a process whose working directory is `folder`.

    Among the documents are an empty one and one that is a validation text. Returns the training texts that count, in order."""
    root = folder / "allenai" / "c4"
    (root / "en").mkdir(parents=True)
    (root / "README.md").write_text(README)
    draw = random.Random(0)

    def text(number: int) -> str:
        return f"{number} " + " ".join(draw.choices(WORDS, k=draw.randrange(3, 60)))

    texts = [text(n) for n in range(documents)]
    held_out = [text(-n) for n in range(validation)]
    rows = [*texts[:7], "", held_out[3], *texts[7:]]
    size = -(-len(rows) // files)
    for kind, all_rows, count in (("train", rows, files), ("validation", held_out, 1)):
        for number in range(count):
            part = all_rows[number * size : (number + 1) * size] if kind == "train" else all_rows
            with gzip.open(root / "en" / f"c4-{kind}.{number:05d}-of-{count:05d}.json.gz", "wt") as file:
                file.writelines(json.dumps({"text": row, "url": "http://a.example"}) + "\n" for row in part)
    return texts
