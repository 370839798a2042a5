"""Orders a checkpoint's experts so that little routed traffic leaves a rank, or so that frequent paths line up.

The file that it writes is for `titan-moe train --checkpoint.expert_order=FILE`, and for `--placement FILE` of `eval` and
`generate`.

examples: titan-moe place runs/debug --ranks 4
          titan-moe place runs/debug --ranks 8 --nodes 2 --card H100
"""

from argparse import ArgumentParser, Namespace

from titan_moe.config.load import world_size_from_environment
from titan_moe.errors import UserError
from titan_moe.runtime.cards import card_named
from titan_moe.runtime.ranks import check_ranks
from titan_moe.verbs.arguments import add_number, add_overrides, add_runs, file_argument


def add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser, count=None)
    add_number(parser, "--ranks", 8, "ranks to distribute the experts over", 2)
    parser.add_argument(
        "--by-paths", action="store_true", help="number experts by the tokens' paths through the layers"
    )
    meaning = "also simulate the time of a forward pass on this card, as `titan-moe plan --card`"
    parser.add_argument("--card", default="", metavar="NAME", help=meaning)
    add_number(parser, "--nodes", 1, "with --card: nodes that the ranks are spread over")
    add_number(parser, "--batch-size", 1, "with --card: sequences of a rank in a batch")
    meaning = "where to write (default: order-N-ranks.json or order-by-paths.json in RUN)"
    parser.add_argument("--output", type=file_argument, metavar="FILE", help=meaning)
    add_overrides(parser)


def run(arguments: Namespace) -> int:
    check_ranks()
    card = card_named(arguments.card) if arguments.card else None
    if card and arguments.by_paths:
        raise UserError("--card: simulates a placement on ranks, and --by-paths makes none; leave one of the two out")
    from titan_moe.analysis.inspect.inspection import Options
    from titan_moe.analysis.place.clock import machine_of
    from titan_moe.analysis.place.place import write_placement
    from titan_moe.analysis.processes import ranks_of
    from titan_moe.checkpoint.chosen import from_checkpoint

    world = world_size_from_environment()
    (checkpoint,), config = from_checkpoint([arguments.runs], False, arguments.overrides, world, arguments.trust)
    options = Options(arguments.text, arguments.sequences, cluster_tokens=0, examples=0)
    machine = None
    if card:
        machine = machine_of(arguments.card, card, arguments.ranks, arguments.nodes, arguments.batch_size)
    with ranks_of(config) as mesh:
        ranks = None if arguments.by_paths else arguments.ranks
        write_placement(checkpoint, config, mesh, options, ranks, arguments.output, machine)
    return 0
