"""Measures routing and expert specialization of checkpoints, on the run's validation text or on another text.

examples: titan-moe inspect runs/debug --all
          titan-moe inspect runs/debug --text docs --sequences 100
"""

from argparse import ArgumentParser, Namespace

from titan_moe.config.load import world_size_from_environment
from titan_moe.runtime.ranks import check_ranks
from titan_moe.verbs.arguments import (
    add_number,
    add_overrides,
    add_runs,
    directory_argument,
    file_argument,
    path_argument,
)


def add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--all", action="store_true", help="all checkpoints of a run (default: its newest)")
    add_number(parser, "--cluster-tokens", 2048, "tokens to cluster", 0)
    add_number(parser, "--examples", 8, "tokens shown for each expert", 0)
    meaning = "JSON file, or a directory for several checkpoints (default: RUN/inspect/)"
    parser.add_argument("--output", type=path_argument, metavar="FILE", help=meaning)
    add_overrides(parser)


def run(arguments: Namespace) -> int:
    check_ranks()
    from titan_moe.analysis.inspect.inspection import Options, inspect, write_results
    from titan_moe.analysis.processes import ranks_of
    from titan_moe.checkpoint.chosen import from_checkpoint

    options = Options(arguments.text, arguments.sequences, arguments.cluster_tokens, arguments.examples)
    world = world_size_from_environment()
    checkpoints, config = from_checkpoint(arguments.runs, arguments.all, arguments.overrides, world, arguments.trust)
    if arguments.output is not None:
        (file_argument if len(checkpoints) == 1 else directory_argument)(str(arguments.output))
    with ranks_of(config) as mesh:
        results = inspect(checkpoints, config, mesh, options)
    write_results(checkpoints, results, options.text, arguments.output)
    return 0
