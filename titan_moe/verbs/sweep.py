"""Runs a grid of configurations, several at a time, and writes tables that compare them; a killed sweep continues.

example: titan-moe sweep --config nano_lr --processes 2 --training.steps=800
"""

from argparse import ArgumentParser, Namespace

from titan_moe.verbs.arguments import add_number, add_overrides, add_trust, directory_argument


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a file of train_configs/sweeps/ by name, or a path")
    parser.add_argument("--base", default="", help="the configuration to start from (default: the one the sweep names)")
    parser.add_argument(
        "--output", type=directory_argument, metavar="DIR", help="where to write (default: runs/sweeps/CONFIG)"
    )
    parser.add_argument("--tables", action="store_true", help="only write the tables of finished runs again")
    add_number(parser, "--processes", 1, "runs at the same time")
    add_trust(parser)
    add_overrides(parser)


def run(arguments: Namespace) -> int:
    from titan_moe.analysis.sweep.sweep import run_sweep

    a = arguments
    return run_sweep(a.config, a.base, a.output, a.overrides, a.processes, a.tables, a.trust)
