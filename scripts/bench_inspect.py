"""The time of an inspection, without the clustering measures, relative to a validation of the same text.

    python scripts/bench_inspect.py [--config nano] [--sequences 64] [--pairs 5] [--section.key=value ...]

Both run on the same sequences with the same (initial) weights, alternating. Prints the ratio of the medians, and the
smallest and largest ratio of a pair of runs.
"""

import argparse
import statistics

import torch
from benchmarking import seconds

from titan_moe.analysis.inspect.inspection import InspectedModel, Options
from titan_moe.config.load import load_config
from titan_moe.config.tables import Regularizers
from titan_moe.data.prepare import prepare
from titan_moe.parallel.mesh import single
from titan_moe.parallel.parallelize import build_runner
from titan_moe.runtime.allocator import keep_freed_memory
from titan_moe.train.build import build_model
from titan_moe.train.validation import validate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nano")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    options, words = parser.parse_known_args()
    keep_freed_memory()
    config, mesh = load_config(options.config, words), single(torch.device("cpu"))
    # Validation would compute the enabled regularizers.
    config = config.model_copy(update={"regularizers": Regularizers()})
    inspected = InspectedModel(config, prepare(config), mesh, Options(sequences=options.sequences, cluster_tokens=0))
    tokenizer = inspected.prepared.tokenizer
    plain = build_runner(build_model(config, tokenizer.vocab_size, mesh), config, mesh)
    size = config.training.microbatch_size or config.training.batch_size

    def validation() -> None:
        validate(plain, inspected.windows, tokenizer, options.sequences, size, mesh)

    def inspection() -> None:
        inspected.run_on_text(inspected.tally())

    validation()
    inspection()
    times = [(seconds(validation), seconds(inspection)) for _ in range(options.pairs)]
    ratios = [b / a for a, b in times]
    median = statistics.median(b for _, b in times) / statistics.median(a for a, _ in times)
    print(f"{options.config}: inspection / validation {median:.2f} (pairs {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
