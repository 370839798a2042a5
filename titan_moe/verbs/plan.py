"""Counts parameters and FLOPs, and estimates the memory and traffic of one rank, without training.

example: titan-moe plan --config medium --world 16 --parallelism.ep=4
"""

from argparse import ArgumentParser, Namespace

from titan_moe.config.load import load_config, world_size_from_environment
from titan_moe.verbs.arguments import add_config, add_number


def add_arguments(parser: ArgumentParser) -> None:
    add_number(parser, "--world", world_size_from_environment(), "number of ranks to plan for")
    add_config(parser)


def run(arguments: Namespace) -> int:
    a = arguments
    config = load_config(a.config, a.overrides, world_size=a.world, trust=a.trust, reads_files=False)
    from titan_moe.estimate.plan import plan_text  # imports torch, so after the checks

    print(plan_text(config, arguments.world))
    return 0
