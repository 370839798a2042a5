"""titan-moe inspect: routing and specialization measures of checkpoints, on their validation text or on another."""

from pathlib import Path

from titan_moe.analysis.inspect.inspection import Options, from_checkpoint, inspect, place_of, table, write_result
from titan_moe.config.load import world_size_from_environment
from titan_moe.verbs.common import print_table, ranks_of
from titan_moe.verbs.words import take_flag, take_number, take_option, take_text


def run(words: list[str]) -> int:
    every, words = take_flag(words, "--all")
    output, words = take_option(words, "--output", "")
    clustered, words = take_number(words, "--cluster-tokens", 2048, "tokens to cluster", 0)
    examples, words = take_number(words, "--examples", 8, "tokens shown for each expert", 0)
    text, sequences, paths, overrides = take_text(words, "inspect")
    checkpoints, config = from_checkpoint(paths, every, overrides, world_size_from_environment())
    with ranks_of(config) as mesh:
        results = inspect(checkpoints, config, mesh, Options(text, sequences, clustered, examples))
    for checkpoint, result in zip(checkpoints, results, strict=bool(results)):
        path = place_of(checkpoint, text)
        if output:
            path = Path(output) / path.name if len(checkpoints) > 1 else Path(output)
        write_result(result, path)
        print_table(table(result))
        print(path)
    return 0
