"""Plots one run's loss, regularizers and routing measures over the steps, from its metrics.jsonl.

python scripts/plot_run.py runs/debug docs/images/debug.png        (needs the extra `bench`)
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

PANELS = (
    ("cross-entropy (nats)", ("ce",)),
    ("lb", ("reg/lb",)),
    ("z", ("reg/z",)),
    ("sp", ("reg/sp",)),
    ("cp", ("reg/cp",)),
    ("o", ("reg/o",)),
    ("v", ("reg/v",)),
    ("erc", ("reg/erc",)),
    ("overlap: mean squared cosine", ("moe/overlap",)),
    ("routing entropy (nats)", ("moe/entropy",)),
    ("top-k mass", ("moe/topk_mass",)),
    ("max_vio and dead experts", ("moe/max_vio", "moe/dead")),
)


def plot(run: Path, output: Path) -> None:
    """Writes the image `output` for the run directory `run`."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    panels = [(title, names) for title, names in PANELS if names[0] in train[0]]
    rows_of_panels = -(-len(panels) // 4)
    figure, axes = plt.subplots(rows_of_panels, 4, figsize=(13, 2.5 * rows_of_panels), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for name in names:
            logged = [row for row in train if name in row]
            axis.plot([row["step"] for row in logged], [row[name] for row in logged], label=name, linewidth=1)
        if names == ("ce",):
            axis.plot(
                [row["step"] for row in validation], [row["loss"] for row in validation], "o-", label="validation"
            )
        if len(names) > 1 or names == ("ce",):
            axis.legend(frameon=False)
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
