"""Draws the figures of docs/results.md, one per claim, from the rows of the sweeps, or else from the tables of
docs/results_tables.md and docs/results_copied.md (then without the dots of the seeds).

    python scripts/draw_results.py [--output docs/images/results]
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from draw_architecture import FAINT, INK, PAPER
from matplotlib import pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from results_sources import EVIDENCE, ROOT, SWEEPS, TABLE_PAGES, Source, find_source

from titan_moe.analysis.sweep.grid import config_path, read_sweep
from titan_moe.config.load import load_config
from titan_moe.errors import UserError
from torchtitan_ext.terms.specialization import chance_overlap

PICTURES = ROOT / "docs" / "images" / "results"
SETTINGS = {"nano": "experts from scratch", "nano_upcycled": "experts copied from a dense model"}
ARMS = {
    "lb": "load balance only (lb)",
    "lb,z": "lb, router z-loss",
    "lb,sp": "lb, sp",
    "lb,cp": "lb, cp",
    "lb,sp,cp": "lb, sp, cp",
    "lb,cp paper": "lb, cp (paper's weight)",
    "lb,sp,cp paper": "lb, sp, cp (paper's weights)",
    "lb,cp activated": "lb, cp over chosen experts",
    "lb,cp transition": "lb, cp over transitions",
    "lb,o,v": "lb, orthogonality, variance (o, v)",
    "lb,erc": "lb, expert-router coupling (erc)",
    "lb,entropy": "control: lb, entropy penalty",
    "lb,shuffled sp": "control: lb, sp on random pairs",
}
CONTROLS = ("lb,entropy", "lb,shuffled sp")
DOT, MARK = "#8a93a3", "#1f3d7a"


def forest(axis: Any, source: Source, measure: str, title: str, values: bool, names: bool = True) -> None:
    """A line per arm: mean, 95% interval of its difference to the baseline, and every seed as a dot.

    values: the measure itself instead of the difference; the interval then stands around the arm's mean."""
    baseline, *others = source.arms()
    arms = [baseline, *others] if values else others
    for y, arm in enumerate(arms):
        change, mean = source.difference(arm, measure), source.mean(arm, measure)
        center = mean if values else None if change is None else change.mean
        if center is None:
            continue
        dots = source.values(arm, measure) if values else source.gaps(arm, measure)
        axis.scatter(dots, [y + 0.22] * len(dots), s=9, color=DOT, linewidths=0, zorder=2)
        if change is not None and change.pairs > 1:
            low, high = (center + end - change.mean for end in (change.low, change.high))
            axis.plot([low, high], [y, y], color=INK, linewidth=1.6, zorder=3)
        shape = "s" if arm in CONTROLS else "D" if arm == baseline else "o"
        axis.plot(
            [center], [y], shape, color=PAPER if arm in CONTROLS else MARK, markeredgecolor=MARK, markersize=6, zorder=4
        )
    axis.set_yticks(range(len(arms)), [ARMS.get(arm, arm) for arm in arms] if names else [""] * len(arms), size=8.5)
    axis.set_ylim(len(arms) - 0.5, -0.6)
    axis.set_title(title, size=10, color=INK)
    axis.grid(axis="y", color=FAINT, linewidth=0.4, alpha=0.5)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    if not values:
        axis.axvline(0, color=INK, linewidth=0.8, linestyle=":")


def draw_loss(figure: Any, sources: Sequence[Source]) -> None:
    for axis, source in zip(figure.subplots(1, len(sources)), sources, strict=True):
        forest(axis, source, "loss", f"{SETTINGS[source.name]}\n{counted(source)}", values=False)
        axis.set_xlabel("validation loss minus that of lb (nats); left is better", size=9)


def draw_overlap(figure: Any, sources: Sequence[Source]) -> None:
    for axis, source in zip(figure.subplots(1, len(sources)), sources, strict=True):
        forest(axis, source, "moe/overlap", f"{SETTINGS[source.name]}\n{counted(source)}", values=True)
        path, sweep = read_sweep(source.name)
        chance = chance_overlap(load_config(config_path(path, sweep.config), []).model.moe.hidden_dim)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.axvline(chance, color=INK, linewidth=1, linestyle="--")
        axis.text(chance, -0.62, f"chance {chance:.2g}", size=8, color=INK, ha="center", va="bottom")
        axis.set_title(axis.get_title(), size=10, color=INK, pad=14)
        axis.set_xlabel("overlap: mean squared cosine (logarithmic scale)", size=9)


def draw_sharpness(figure: Any, sources: Sequence[Source]) -> None:
    words = {
        "moe/topk_mass": "sharper: score mass on the chosen experts",
        "inspect/persistence_top1": "steadier: first choices kept to the end",
    }
    grid(figure, sources, words, values=True)


def draw_balance(figure: Any, sources: Sequence[Source]) -> None:
    words = {
        "moe/max_vio": "busiest expert over the mean",
        "reg/lb": "load balance loss",
        "moe/dead": "fraction of experts without a token",
    }
    figure.suptitle("differences to load balance only (lb)", size=10, color=INK)
    grid(figure, sources, words, values=False)


def grid(figure: Any, sources: Sequence[Source], words: dict[str, str], values: bool) -> None:
    """A row per setting, a column per measure."""
    axes = figure.subplots(len(sources), len(words), squeeze=False)
    for row, source in zip(axes, sources, strict=True):
        for number, (axis, (measure, title)) in enumerate(zip(row, words.items(), strict=True)):
            above = f"{SETTINGS[source.name]}, {counted(source)}\n" if number == 0 else "\n"
            forest(axis, source, measure, above + title, values, names=number == 0)


def draw_paths(figure: Any, sources: Sequence[Source]) -> None:
    """Arms as points: how much of what looks like paths comes with sharpness alone."""
    words = {
        "inspect/kappa": "paths from layer to layer (kappa)",
        "inspect/domain_information": "expert and kind of text (nats)",
    }
    short = {
        "lb": ("lb", "left", (8, -12)),
        "lb,sp": ("sp", "right", (-8, 4)),
        "lb,cp": ("cp", "left", (8, 6)),
        "lb,sp,cp": ("sp, cp", "right", (-8, 8)),
        "lb,entropy": ("entropy penalty (control)", "right", (-8, -14)),
    }
    axes = figure.subplots(len(sources), 2, squeeze=False)
    for row, source in zip(axes, sources, strict=True):
        for number, (axis, (measure, title)) in enumerate(zip(row, words.items(), strict=True)):
            drawn = [arm for arm in source.arms() if arm in short]
            for arm in drawn:
                x, y, change = (
                    source.mean(arm, "moe/topk_mass"),
                    source.mean(arm, measure),
                    source.difference(arm, measure),
                )
                if x is None or y is None:
                    continue
                pairs = zip(source.values(arm, "moe/topk_mass"), source.values(arm, measure), strict=False)
                for dot in pairs:
                    axis.plot(*dot, ".", color=DOT, markersize=4, zorder=2)
                if change is not None and change.pairs > 1:
                    ends = [y + end - change.mean for end in (change.low, change.high)]
                    axis.plot([x, x], ends, color=INK, linewidth=1.4, zorder=3)
                shape = "s" if arm in CONTROLS else "D" if arm == "lb" else "o"
                fill = PAPER if arm in CONTROLS else MARK
                axis.plot([x], [y], shape, color=fill, markeredgecolor=MARK, markersize=7, zorder=4)
                label, side, offset = short[arm]
                axis.annotate(label, (x, y), offset, textcoords="offset points", ha=side, size=9, color=INK)
            above = f"{SETTINGS[source.name]}, {counted(source)}\n" if number == 0 else "\n"
            axis.set_title(above + title, size=10, color=INK)
            axis.set_xlabel("score mass on the chosen experts (top-k mass)", size=9)
            axis.margins(0.18)


def counted(source: Source) -> str:
    """How many seeds the arms have, in words."""
    seeds = [source.seeds(arm) for arm in source.arms()]
    if min(seeds) == max(seeds):
        return f"{seeds[0]} seeds" if seeds[0] > 1 else "one seed"
    return f"{min(seeds)} to {max(seeds)} seeds"


FIGURES: dict[str, tuple[Callable[[Any, Sequence[Source]], None], tuple[float, float]]] = {
    "loss": (draw_loss, (11, 3.9)),
    "overlap": (draw_overlap, (11, 4.1)),
    "sharpness": (draw_sharpness, (10, 7.2)),
    "paths": (draw_paths, (9, 6.6)),
    "balance": (draw_balance, (12, 7.0)),
}
"""By the picture's name: what draws it, and its size in inches."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=PICTURES, help="folder of the pictures (default: docs/images/results)"
    )
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="folder of row files (default: docs/evidence)")
    parser.add_argument("--sweeps", type=Path, default=SWEEPS, help="folder of sweeps (default: runs/sweeps)")
    parser.add_argument(
        "--tables", type=Path, nargs="+", default=TABLE_PAGES, help="pages with the tables of other sweeps"
    )
    options = parser.parse_args(arguments)
    plt.rcParams.update({"axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    plt.rcParams.update({"font.size": 9, "text.color": INK})
    find = lru_cache(maxsize=None)(lambda name: find_source(name, options.evidence, options.sweeps, options.tables))
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        for name, (draw, size) in FIGURES.items():
            layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
            figure = plt.figure(figsize=size, facecolor=PAPER, layout=layout)
            draw(figure, [find(sweep) for sweep in SETTINGS])
            for axis in figure.axes:
                axis.set_facecolor(PAPER)
                axis.spines[["top", "right"]].set_visible(False)
            # Without the library's version, so that equal numbers give equal files.
            figure.savefig(options.output / f"{name}.png", dpi=90, facecolor=PAPER, metadata={"Software": None})
            plt.close(figure)
            print(options.output / f"{name}.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
