"""Counts parameters and FLOPs, and estimates the memory and traffic of one rank, without training.

examples: titan-moe plan --config medium --world 16 --parallelism.ep=4
          titan-moe plan --config large --world 512 --card H100
"""

from argparse import ArgumentParser, Namespace

from titan_moe.config.load import load_config, world_size_from_environment
from titan_moe.errors import UserError
from titan_moe.runtime.cards import CARDS, card_named
from titan_moe.verbs.arguments import add_config, add_number


def add_arguments(parser: ArgumentParser) -> None:
    add_number(parser, "--world", world_size_from_environment(), "number of ranks to plan for")
    names = ", ".join(CARDS)
    parser.add_argument("--card", default="", metavar="NAME", help=f"also predict a step's time on this GPU: {names}")
    add_config(parser)


def run(arguments: Namespace) -> int:
    a = arguments
    if a.card:
        card_named(a.card)
    config = load_config(a.config, a.overrides, world_size=a.world, trust=a.trust, reads_files=False)
    if a.card and config.training.dtype != "bfloat16":
        raise UserError(
            f"--card predicts steps in bfloat16, but training.dtype = {config.training.dtype!r}; add --training.dtype=bfloat16"
        )
    from titan_moe.estimate.plan import plan_text  # imports torch, so after the checks

    print(plan_text(config, a.world, a.card))
    return 0
