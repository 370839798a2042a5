"""Runs a grid of configurations, several at a time, and writes tables that compare them; a killed sweep continues.

Every finished cell leaves a small file in DIR/cells. With --merge, files that other machines made count as finished cells.
The tables have two kinds of interval for the difference to the baseline: by Student's t, for a number of seeds that was
fixed before; and one that holds at any time, for who looks after every seed. Where the second excludes 0, or lies within
the sweep's margin, the arm is decided; with `sequential = true` in the sweep's file it gets no more seeds.

example: titan-moe sweep --config nano_lr --processes 2 --training.steps=800
"""

import re
from argparse import ArgumentParser, Namespace

from titan_moe.errors import UserError
from titan_moe.verbs.arguments import add_number, add_overrides, add_trust, directory_argument, path_argument


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a file of train_configs/sweeps/ by name, or a path")
    parser.add_argument("--base", default="", help="the configuration to start from (default: the one the sweep names)")
    parser.add_argument(
        "--output", type=directory_argument, metavar="DIR", help="where to write (default: runs/sweeps/CONFIG)"
    )
    parser.add_argument("--tables", action="store_true", help="only write the tables of finished runs again")
    add_number(parser, "--processes", 1, "runs at the same time")
    parser.add_argument(
        "--minutes",
        type=minutes,
        metavar="M",
        help="stop after M minutes; running cells save, and the same command goes on",
    )
    parser.add_argument(
        "--merge",
        nargs="+",
        type=path_argument,
        default=[],
        metavar="DIR",
        help="count the finished cells of these directories of the same sweep, from other machines say",
    )
    add_trust(parser)
    add_overrides(parser)


def minutes(text: str) -> float:
    """A positive number. Raises UserError."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text) or float(text) <= 0:
        raise UserError(f"--minutes = {text[:80]!r}: wants a positive number")
    return float(text)


def run(arguments: Namespace) -> int:
    from titan_moe.analysis.sweep.sweep import run_sweep

    a = arguments
    return run_sweep(a.config, a.base, a.output, a.overrides, a.processes, a.tables, a.trust, a.minutes, a.merge)
