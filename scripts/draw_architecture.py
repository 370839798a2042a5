"""Draws docs/images/architecture.png: the folders and the direction of imports, and the way of a token through one MoE layer.

    python scripts/draw_architecture.py [PICTURE]

Stops, and names the imports, when one of them points upward in the picture.
"""

import ast
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "architecture.png"

# Rows of folders of titan_moe/ from top to bottom. A folder imports folders of lower rows only.
ROWS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("verbs", "train, finetune, plan, inspect, report, sweep, place, export, import, generate, eval"),),
    (("analysis", "what the experts do: measures, pages, sweeps"),),
    (("generate", "key-value cache, sampling, text"), ("finetune", "Transformers models, through TRL")),
    (("train", "the training loop, logging, validation"), ("weights", "for other programs")),
    (("checkpoint", "save, resume"), ("estimate", "memory, traffic")),
    (
        ("parallel", "FSDP, expert, context, pipeline, tensor"),
        ("optim", "AdamW, Muon"),
        ("extend", "for your own code"),
    ),
    (("model", "attention, MoE layer, output head"), ("data", "text, tokenizer, batches")),
    (("config", "TOML tables, checks, help"),),
    (("runtime", "device, log, launcher, files, locks"),),
)
LIBRARY = (
    ("terms", "one file\nper loss"),
    ("ops", "operations"),
    ("kernels", "Triton"),
    ("carry", "sums over\nlayers"),
    ("metrics", "routing\nmeasures"),
)

PAPER, INK, FAINT = "#fbfbfd", "#1f2430", "#5b6472"
BLUE, GREEN, ORANGE = "#dbe7fb", "#d9f0e0", "#fde6cc"
BLUE_EDGE, GREEN_EDGE, ORANGE_EDGE = "#3f6fc4", "#2d8a4e", "#c8741a"


def folder_of(module: str) -> str:
    """The folder of titan_moe (or file directly in it) that a module belongs to; torchtitan_ext as one."""
    parts = module.split(".")
    return parts[0] if parts[0] == "torchtitan_ext" else parts[1] if len(parts) > 1 else ""


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, importing folder, imported folder) for every import between folders."""
    for package in ("titan_moe", "torchtitan_ext"):
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).with_suffix("")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    if name.split(".")[0] in ("titan_moe", "torchtitan_ext"):
                        yield str(file), folder_of(".".join(file.parts)), folder_of(name)


def upward_imports() -> list[str]:
    """Imports that point upward or sideways in the picture: there must be none."""
    row = {name: number for number, names in enumerate(ROWS) for name, _ in names} | {"torchtitan_ext": len(ROWS)}
    return [
        f"{file} imports {imported}"
        for file, importer, imported in imports()
        if importer != imported and importer in row and imported in row and row[importer] >= row[imported]
    ]


def box(
    axis: Any, x: float, y: float, width: float, height: float, title: str, words: str, color: str, edge: str
) -> None:
    """A box with its lower left corner at (x, y): a title in bold, a few words under it."""
    shape = "round,pad=0,rounding_size=0.09"
    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=color, edgecolor=edge, linewidth=1.2)
    )
    middle = x + width / 2
    lines = words.count("\n") + 1 if words else 0
    shift = 0.105 * lines
    axis.text(middle, y + height / 2 + shift, title, ha="center", va="center", size=11, weight="bold", color=INK)
    if words:
        axis.text(
            middle, y + height / 2 - 0.125, words, ha="center", va="center", size=8.8, color=INK, linespacing=1.15
        )


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK, bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axis.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, linewidth=1.5, color=color, connectionstyle=style
        )
    )


def draw_folders(axis: Any) -> None:
    height, gap, width = 0.56, 0.145, 6.0
    top = 7.16
    axis.text(0.75, 8.0, "Folders: each imports only those below it", size=13, weight="bold", color=INK)
    for number, names in enumerate(ROWS):
        y = top - number * (height + gap)
        total = width - 0.15 * (len(names) - 1)
        weights = [max(len(line) for line in words.split("\n")) + 8 for _, words in names]
        x = 0.75
        for (name, words), weight in zip(names, weights, strict=True):
            part = total * weight / sum(weights)
            title = f"{name}.py" if name == "extend" else f"{name}/"
            box(axis, x, y, part, height, title, words, BLUE, BLUE_EDGE)
            x += part + 0.15
    bottom = top - (len(ROWS) - 1) * (height + gap)
    axis.text(
        0.4, (top + height + bottom) / 2, "titan_moe", rotation=90, va="center", ha="center", size=12, color=BLUE_EDGE
    )
    y = bottom - 1.2
    part = (width - 0.15 * (len(LIBRARY) - 1)) / len(LIBRARY)
    for number, (name, words) in enumerate(LIBRARY):
        title = f"{name}/" if name in ("terms", "ops", "kernels") else f"{name}.py"
        box(axis, 0.75 + number * (part + 0.15), y, part, 0.95, title, words, GREEN, GREEN_EDGE)
    axis.text(0.4, y + 0.47, "torchtitan\n_ext", rotation=90, va="center", ha="center", size=10, color=GREEN_EDGE)
    arrow(axis, (7.05, top + height), (7.05, y + 0.1), FAINT)
    axis.text(7.2, (top + y + height) / 2, "imports", rotation=270, va="center", ha="center", size=10, color=FAINT)


def draw_layer(axis: Any) -> None:
    """The steps of `MoELayer.forward` from top to bottom, the loss terms beside them."""
    left, width, height, gap = 8.3, 2.9, 0.66, 0.33
    axis.text(left, 8.0, "A token's way through one MoE layer", size=13, weight="bold", color=INK)
    steps = (
        ("router", "scores, top-k experts, gates", BLUE, BLUE_EDGE),
        ("dispatch", "a row per token and expert", BLUE, BLUE_EDGE),
        ("hidden", "each expert: gate, up, SwiGLU", BLUE, BLUE_EDGE),
        ("observe", "terms read the activations", GREEN, GREEN_EDGE),
        ("output", "each expert: down projection", BLUE, BLUE_EDGE),
        ("combine", "rows times gates, summed", BLUE, BLUE_EDGE),
    )
    top, middle = 6.72, left + width / 2
    bottoms = [top - number * (height + gap) for number in range(len(steps))]
    arrow(axis, (middle, top + height + 0.36), (middle, top + height))
    axis.text(middle + 0.12, top + height + 0.26, "hidden states", va="center", size=9.5, color=FAINT)
    for (title, words, color, edge), y in zip(steps, bottoms, strict=True):
        box(axis, left, y, width, height, title, words, color, edge)
    for above, below in itertools.pairwise(bottoms):
        arrow(axis, (middle, above), (middle, below + height))
    arrow(axis, (middle, bottoms[-1]), (middle, bottoms[-1] - 0.4))
    axis.text(middle + 0.12, bottoms[-1] - 0.24, "to the residual stream", va="center", size=9.5, color=FAINT)
    for number in (1, 5):
        axis.text(
            left - 0.12,
            bottoms[number] + height / 2,
            "all-to-all\nwith ep",
            ha="right",
            va="center",
            size=8.5,
            color=FAINT,
        )

    x, terms_width, terms_height = 12.3, 2.3, 1.5
    y = bottoms[3] - 0.42
    box(axis, x, y, terms_width, terms_height, "terms", "lb  z  sp  cp\no  v  erc\nand your own", GREEN, GREEN_EDGE)
    arrow(axis, (left + width, bottoms[0] + height / 2), (x + 0.5, y + terms_height), GREEN_EDGE, bend=-0.25)
    axis.text(left + width + 0.2, bottoms[0] + 0.5, "scores, chosen experts", size=9, color=GREEN_EDGE)
    for number, words in ((3, "sp: Gram"), (4, "o: outputs")):
        height_there = min(bottoms[number] + height / 2, y + terms_height - 0.2) if number == 3 else y + 0.2
        start = (left + width, bottoms[number] + height / 2)
        arrow(axis, start, (x, height_there), GREEN_EDGE)
        axis.text(left + width + 0.1, start[1] + (0.12 if number == 3 else -0.22), words, size=9, color=GREEN_EDGE)
    carry = x + terms_width - 0.45
    arrow(axis, (carry, top + height + 0.36), (carry, y + terms_height), ORANGE_EDGE)
    arrow(axis, (carry, y), (carry, bottoms[-1] - 0.4), ORANGE_EDGE)
    axis.text(carry - 0.12, top + 0.75, "carry", ha="right", size=9.5, color=ORANGE_EDGE)
    axis.text(carry - 0.12, bottoms[-1] + 0.42, "carry", ha="right", size=9.5, color=ORANGE_EDGE)
    words = "terms summed so far,\nload per expert, what cp\nneeds of the layer before"
    axis.text(carry - 0.12, bottoms[-1] - 0.3, words, ha="right", va="bottom", size=8.8, color=FAINT, linespacing=1.25)
    y = bottoms[-1] - 1.28
    width = x + terms_width - left
    box(axis, left, y, width, 0.6, "loss = cross-entropy + sum of weight x term", "", ORANGE, ORANGE_EDGE)
    axis.text(left + width / 2, y + 0.7, "after the last layer", ha="center", size=9, color=FAINT)


def main(picture: Path) -> None:
    wrong = upward_imports()
    if wrong:
        sys.exit("The rows of the picture are not the direction of imports:\n  " + "\n  ".join(wrong))
    figure, axis = plt.subplots(figsize=(13.2, 7.6), facecolor=PAPER, layout="constrained")
    axis.set(xlim=(0.1, 14.8), ylim=(0.3, 8.35))
    axis.set_axis_off()
    draw_folders(axis)
    draw_layer(axis)
    figure.savefig(picture, dpi=100, facecolor=PAPER)
    print(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
