"""Draws docs/images/sp_cp.png: what sp and cp do, as a schematic, and what they did, from the numbers of the results pages.

python scripts/draw_losses.py [PICTURE]
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from draw_architecture import FAINT, INK, PAPER, arrow
from matplotlib import pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine
from results_sources import Source, find_source

from titan_moe.config.load import load_config
from titan_moe.errors import UserError
from torchtitan_ext.terms.specialization import chance_overlap

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "sp_cp.png"

GREY, SP, CP, CONTROL = "#9aa3b2", "#2d8a4e", "#3f6fc4", "#d9b26a"
SETTINGS = {"nano": "experts from scratch", "nano_upcycled": "experts copied from a dense model"}


def draw_specialization(axis: Any) -> None:
    """Activations of two experts that one token chose: at a small angle without sp, at a right angle with it."""
    for x, degrees, words in ((0.0, (65, 35), "without sp"), (1.5, (100, 10), "with sp")):
        for angle, name in zip(degrees, ("expert a", "expert b"), strict=True):
            tip = (x + 0.95 * np.cos(np.radians(angle)), 0.95 * np.sin(np.radians(angle)))
            arrow(axis, (x, 0.0), tip, SP if words == "with sp" else GREY)
            axis.text(tip[0] + 0.03, tip[1] + 0.05, name, size=8.5, color=INK)
        axis.text(x + 0.4, -0.2, words, ha="center", size=10, color=INK)
    axis.set(xlim=(-0.25, 3.0), ylim=(-0.35, 1.25), aspect="equal")
    axis.set_title("sp: a token's experts\nshould not compute the same", loc="left", size=11, weight="bold", color=INK)
    axis.set_axis_off()


def draw_coupling(axis: Any) -> None:
    """Routing probabilities from an expert of one layer to those of the next: spread without cp, concentrated with it."""
    for x, widths, words in ((0.0, (1.4, 1.4, 1.4, 1.4), "without cp"), (1.6, (0.35, 4.2, 0.35, 0.35), "with cp")):
        color = CP if words == "with cp" else GREY
        for number, width in enumerate(widths):
            axis.plot([x, x + 0.85], [0.5, number / 3], color=color, linewidth=width, zorder=1, solid_capstyle="round")
        axis.scatter([x], [0.5], s=110, color=color, zorder=2)
        axis.scatter([x + 0.85] * 4, [n / 3 for n in range(4)], s=[60 + 22 * w for w in widths], color=color, zorder=2)
        axis.text(x + 0.42, -0.32, words, ha="center", size=10, color=INK)
        axis.text(x, 1.17, "layer l", ha="center", size=8.5, color=FAINT)
        axis.text(x + 0.85, 1.17, "layer l+1", ha="center", size=8.5, color=FAINT)
    axis.set(xlim=(-0.3, 2.85), ylim=(-0.45, 1.35))
    axis.set_title("cp: routing should be decisive\nfrom layer to layer", loc="left", size=11, weight="bold", color=INK)
    axis.set_axis_off()


def bars(axis: Any, values: list[float], names: tuple[str, ...], colors: tuple[str, ...], title: str) -> None:
    drawn = axis.bar(range(len(values)), values, color=colors, width=0.66)
    axis.bar_label(drawn, [f"{value:.2g}" for value in values], size=9, color=INK, padding=2)
    axis.set_xticks(range(len(values)), names, size=8.5)
    axis.set_title(title, size=9.5, color=INK)
    axis.set_yticks([])
    axis.set_ylim(0, max(values) * 1.22)


def means(source: Source, arms: Sequence[str], measure: str) -> list[float]:
    """A measure of these arms. Raises UserError where one is not known."""
    found = [source.mean(arm, measure) for arm in arms]
    known = [value for value in found if value is not None]
    if len(known) < len(arms):
        raise UserError(f"{source.name}: {measure} of {arms[found.index(None)]} is not known")
    return known


def draw_losses(axis: Any, sources: Sequence[Source], arm: str, color: str) -> None:
    """Validation loss of an arm less lb's, with its 95% interval, in both settings."""
    for number, source in enumerate(sources):
        found = source.difference(arm, "loss")
        if found is None:
            raise UserError(f"{source.name}: the loss of {arm} is not known")
        axis.plot([found.low, found.high], [number, number], color=color, linewidth=2.5)
        axis.plot([found.mean], [number], "o", color=color, markersize=8)
        axis.text(found.mean, number + 0.17, f"{found.mean:+.4f}", ha="center", size=9, color=INK)
    axis.axvline(0, color=FAINT, linewidth=1)
    axis.set_yticks(range(2), ["from scratch", "copied"], size=8.5)
    axis.set_ylim(1.5, -0.5)
    axis.set_xlim(-0.08, 0.08)
    axis.set_xticks([-0.05, 0, 0.05], ["-0.05", "0", "+0.05"], size=8.5)
    seeds = " and ".join(map(str, dict.fromkeys(source.seeds(arm) for source in sources)))
    axis.set_title(f"validation loss minus lb's (nats)\n{seeds} seeds, 95% intervals", size=9.5, color=INK)


def main(picture: Path) -> None:
    plt.rcParams.update({"axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK, "font.size": 9})
    figure = plt.figure(figsize=(13.2, 6.2), facecolor=PAPER, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    grid = figure.subplots(2, 4, width_ratios=(1.5, 1, 1, 1.1))
    draw_specialization(grid[0, 0])
    draw_coupling(grid[1, 0])
    sources = [find_source(sweep) for sweep in SETTINGS]
    for column, source in enumerate(sources, start=1):
        sweep, words = source.name, SETTINGS[source.name]
        values = means(source, ("lb", "lb,shuffled sp", "lb,sp"), "moe/overlap")
        axis = grid[0, column]
        bars(axis, values, ("lb", "random\npairs", "lb, sp"), (GREY, CONTROL, SP), f"overlap\n{words}")
        chance = chance_overlap(load_config(f"{sweep}.toml", []).model.moe.hidden_dim)
        axis.plot([-0.5, 2.7], [chance, chance], color=INK, linewidth=1, linestyle=":")
        axis.text(2.75, chance, f"chance\n{chance:.2g}", va="center", ha="left", size=8.5, color=INK)
        axis.set_xlim(-0.5, 3.3)
        values = means(source, ("lb", "lb,entropy", "lb,cp"), "inspect/domain_information")
        names = ("lb", "entropy\npenalty", "lb, cp")
        bars(grid[1, column], values, names, (GREY, CONTROL, CP), f"expert and kind of text (nats)\n{words}")
        grid[1, column].set_xlim(-0.5, 3.3)
    draw_losses(grid[0, 3], sources, "lb,sp", SP)
    draw_losses(grid[1, 3], sources, "lb,cp", CP)
    for axis in grid.flat:
        axis.set_facecolor(PAPER)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(picture, dpi=100, facecolor=PAPER)
    print(picture)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
    except UserError as error:
        sys.exit(f"error: {error}")
