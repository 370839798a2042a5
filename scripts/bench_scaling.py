"""Weak scaling on one machine: tokens per second on 1 and 2 ranks (one thread each), and the fraction of time in
collectives.

    python scripts/bench_scaling.py
    python scripts/bench_scaling.py --steps 20 --sequences 8

The default job's network, with the same number of sequences per rank. Time in collectives is the time that a rank
spends in calls of torch.distributed, waiting for slower ranks included. Every layout is measured three times,
alternating; medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from titan_moe.config.degrees import micro_batch_size, resolve
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.data.loader import Batch, DataRank
from titan_moe.optim import build_optimizer
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.parallelize import build_runner
from titan_moe.runtime.allocator import keep_freed_memory
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step
from torchtitan_ext.collectives import ALL_GATHER, REDUCE_SCATTER

VOCABULARY, WARM_UP = 4096, 3
LAYOUTS = {
    "1 rank": (1, []),
    "2 ranks, FSDP": (2, []),
    "2 ranks, HSDP replicas": (2, ["--parallelism.dp_replicate=2"]),
    "2 ranks, ep 2": (2, ["--parallelism.ep=2"]),
    "2 ranks, cp 2": (2, ["--parallelism.cp=2"]),
    "2 ranks, tp 2": (2, ["--parallelism.tp=2"]),
}
CALLS = ("all_to_all_single", "all_reduce", "all_gather", ALL_GATHER, REDUCE_SCATTER)


class Stopwatch:
    """Seconds spent in collectives; nested calls count once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0
        for name in CALLS:
            setattr(dist, name, self.timed(getattr(dist, name)))
        dist.Work.wait = self.timed(dist.Work.wait)  # type: ignore[method-assign]

    def timed(self, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.depth += 1
            start = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.perf_counter() - start

        return call


def random_batches(config: Config, mesh: Mesh) -> list[Batch]:
    """This rank's micro-batches of a global batch of random tokens, all of them labelled."""
    size, seq = config.training.batch_size, config.training.seq_len
    tokens = torch.randint(VOCABULARY, (size, seq + 1), generator=torch.Generator().manual_seed(0))
    all_labelled = torch.ones(size, seq, dtype=torch.bool)
    positions = torch.arange(seq).expand(size, seq)
    documents = torch.zeros(size, seq, dtype=torch.int64)
    full = Batch(tokens[:, :-1], tokens[:, 1:], all_labelled, documents, positions, torch.arange(size), size * seq)
    part = DataRank(micro_batch_size(config, mesh.degrees), mesh.data_rank, mesh.degrees.data)
    return full.rows(torch.from_numpy(part.rows(size))).split(part.size)


def work(rank: int, world: int, words: list[str], steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    config = load_config("debug", words, world_size=world)
    mesh = Mesh(resolve(config.parallelism, world, str), torch.device("cpu"))
    model = build_model(config, VOCABULARY, mesh)
    runner = build_runner(model, config, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    stopwatch, batches = Stopwatch(), random_batches(config, mesh)
    times, collective_fractions = [], []
    for step in range(1, WARM_UP + steps + 1):
        stopwatch.seconds, start = 0.0, time.perf_counter()
        train_step(runner, optimizer, batches, config, mesh, step, {})
        times.append(time.perf_counter() - start)
        collective_fractions.append(stopwatch.seconds / times[-1])
    if rank == 0:
        measured = (statistics.median(times[WARM_UP:]), statistics.median(collective_fractions[WARM_UP:]))
        Path(folder, "result").write_text(" ".join(map(str, measured)))
    if world > 1:
        dist.destroy_process_group()


def measure(world: int, words: list[str], steps: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(world, words, steps, folder), nprocs=world)
        seconds, collective_fraction = map(float, Path(folder, "result").read_text().split())
    return seconds, collective_fraction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=4, help="per rank")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYOUTS}
    for _ in range(options.rounds):
        for name, (world, words) in LAYOUTS.items():
            size = options.sequences * world
            measured[name].append(measure(world, [*words, f"--training.batch_size={size}"], options.steps))
    seq = load_config("debug", []).training.seq_len
    rates = {
        name: LAYOUTS[name][0] * options.sequences * seq / statistics.median(seconds for seconds, _ in results)
        for name, results in measured.items()
    }
    print("| layout | tokens per second | / 1 rank | per rank / 1 rank | fraction in collectives |")
    print("|---|---|---|---|---|")
    for name, rate in rates.items():
        collective_fraction = statistics.median(collective_fraction for _, collective_fraction in measured[name])
        ratio = rate / rates["1 rank"]
        print(f"| {name} | {rate:,.0f} | {ratio:.2f} | {ratio / LAYOUTS[name][0]:.2f} | {collective_fraction:.2f} |")


if __name__ == "__main__":
    main()
