"""titan-moe place: an order of experts with little traffic over ranks, or one that follows their paths through depth."""

from pathlib import Path

from titan_moe.analysis.inspect.inspection import Options, from_checkpoint
from titan_moe.analysis.place.place import by_paths, facts, for_ranks, table
from titan_moe.checkpoint.expert_order import write_order
from titan_moe.config.load import world_size_from_environment
from titan_moe.verbs.common import print_table, ranks_of
from titan_moe.verbs.words import take_flag, take_number, take_option, take_text


def run(words: list[str]) -> int:
    paths_only, words = take_flag(words, "--by-paths")
    ranks, words = take_number(words, "--ranks", 8, "ranks that share the experts", 2)
    output, words = take_option(words, "--output", "")
    text, sequences, paths, overrides = take_text(words, "place")
    checkpoints, config = from_checkpoint(paths[:1], False, overrides, world_size_from_environment())
    options = Options(text, sequences, cluster_tokens=0, examples=0)
    name = "order-by-paths.json" if paths_only else f"order-{ranks}-ranks.json"
    path = Path(output) if output else checkpoints[0].parent.parent / name
    with ranks_of(config) as mesh:
        if paths_only:
            order, about = by_paths(checkpoints[0], config, mesh, options), {}
        else:
            found = for_ranks(checkpoints[0], config, mesh, options, ranks)
            order, about = found.order, facts(found)
            if mesh.first:
                print_table(table(found, ranks, config.training.batch_size))
        if mesh.first:
            write_order(path, order, checkpoint=str(checkpoints[0]), traffic=about)
            print(path)
    return 0
