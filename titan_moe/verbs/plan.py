"""titan-moe plan: parameters, FLOPs, memory and traffic of one of `--world` ranks, without a training."""

from titan_moe.config.load import world_size_from_environment
from titan_moe.verbs.words import configured, take_number


def run(words: list[str]) -> int:
    world, words = take_number(words, "--world", world_size_from_environment(), "the number of ranks to plan for")
    config = configured(words, world)
    from titan_moe.estimate.plan import plan_text  # takes seconds: after the checks

    print(plan_text(config, world))
    return 0
