"""Samples per second on expert-parallel ranks of this machine: experts in round-robin order and texts in turn, against
`titan-moe place` with texts on the ranks of their first router's experts. Processes with gloo on the CPU, one thread each.

    python scripts/bench_paths.py                         # trains two small runs (lb; lb,sp,cp) into runs/paths, then measures
    python scripts/bench_paths.py runs/lb runs/lb-sp-cp   # measures runs that are there
    python scripts/bench_paths.py --toy                   # seconds; only to see that it works

Scoring is what `titan-moe eval` does with texts, generating what `titan-moe generate --share-prompts` does. Both sides take
turns within a pair, in alternating order; the ratio is the median over pairs with its 95% interval. The texts are the half of
the validation text that the placement was not fitted to, in a fixed random order. The times include the pass up to the first
router, by which texts are distributed.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from benchmarking import interval, seconds
from torch.multiprocessing.spawn import spawn

from titan_moe.analysis.evaluate.scores import Batches, Scored, log_likelihoods
from titan_moe.analysis.place.placement import order_of, round_robin
from titan_moe.checkpoint.chosen import from_checkpoint
from titan_moe.checkpoint.expert_order import write_order
from titan_moe.checkpoint.prepared import prepare_inspection
from titan_moe.checkpoint.state import read_state
from titan_moe.config.degrees import resolve
from titan_moe.data.loader import Windows, permuted
from titan_moe.data.shards import TokenStream
from titan_moe.errors import UserError
from titan_moe.generate.load import load_model
from titan_moe.generate.loop import Options
from titan_moe.generate.sampling import Sampling
from titan_moe.generate.shared import complete_on_ranks
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.replicated import without_fsdp

# The weights of train_configs/sweeps/nano.toml.
ARMS = {"lb": [], "lb-sp-cp": ["--regularizers.sp.weight=2e-2", "--regularizers.cp.weight=1e-2"]}
TOY = [
    "--model.dim=32",
    "--model.layers=2",
    "--model.heads=2",
    "--model.moe.experts=8",
    "--model.moe.top_k=2",
    "--training.seq_len=64",
    "--training.batch_size=4",
    "--tokenizer.vocab_size=512",
    "--lr_scheduler.warmup_steps=1",
    "--data.corpus=stdlib",
    "--data.validation_fraction=0.001",
]
SIDES = ("round-robin", "path-aware with buckets")


class Sizes(NamedTuple):
    samples: int
    """Texts of one measurement, of all ranks together."""
    batch: int
    """Texts of a rank in a batch."""
    prompt: int
    """Tokens of a prompt."""
    new: int
    """Tokens generated for it."""
    pairs: int


class Measured(NamedTuple):
    times: list[tuple[float, float]]
    """Seconds of the two sides, pair by pair."""
    same: float
    """Fraction of texts with the same result on both sides."""


def train(folder: Path, steps: int, more: list[str]) -> list[Path]:
    """The runs of `ARMS`; one that is there already is not trained again."""
    runs = []
    for arm, words in ARMS.items():
        run = folder / arm
        runs.append(run)
        if (run / "checkpoints").exists():
            continue
        command = [sys.executable, "-m", "titan_moe.cli", "train", "--config=nano", f"--job.output_dir={folder}"]
        words = [*words, *more, f"--job.name={arm}", f"--training.steps={steps}", "--validation.interval=0"]
        subprocess.run([*command, "--checkpoint.interval=0", *words], check=True, stdout=subprocess.DEVNULL)
    return runs


def placements(run: Path, ranks: int, folder: Path) -> tuple[Path, Path]:
    """The files with the round-robin and the path-aware order of experts."""
    (checkpoint,), config = from_checkpoint([run], False, [], 1)
    in_turn, placed = folder / "round-robin.json", folder / "placed.json"
    moe, layers = config.model.moe, config.model.layers - config.model.moe.first_dense_layers
    write_order(in_turn, order_of(round_robin(layers, moe.experts, ranks)), ranks=ranks)
    command = [sys.executable, "-m", "titan_moe.cli", "place", str(checkpoint), f"--ranks={ranks}"]
    subprocess.run([*command, f"--output={placed}"], check=True, stdout=subprocess.DEVNULL)
    return in_turn, placed


def held_out(run: Path, count: int) -> list[list[int]]:
    """Every second sequence of the run's validation text, in a fixed random order, with the token after it."""
    (checkpoint,), config = from_checkpoint([run], False, [], 1)
    prepared = prepare_inspection(config, read_state(checkpoint, "checkpoint"), checkpoint, "")
    stream = TokenStream(prepared.folder, prepared.manifest, "validation")
    windows = Windows(stream, config.training.seq_len, prepared.tokenizer.eos)
    odd = np.arange(1, len(windows) - 1, 2, dtype=np.int64)  # the last one may have padding
    if len(odd) < count:
        raise UserError(f"{run}: its validation text has {len(odd)} sequences for this; give --samples={len(odd)}")
    texts: list[list[int]] = windows.tokens(odd[permuted(np.arange(len(odd)), len(odd), key=0)[:count]]).tolist()
    return texts


def work(
    rank: int, world: int, run: Path, files: tuple[Path, Path], texts: list[list[int]], sizes: Sizes, out: str
) -> None:
    """One of `world` processes: measures both sides, and rank 0 writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    words = [f"--parallelism.ep={world}", f"--training.batch_size={world}"]
    (checkpoint,), config = from_checkpoint([run], False, words, world)
    found = {}
    for kind, measure in {"score": scores, "generate": texts_of}.items():
        mesh = Mesh(resolve(config.parallelism, world, str), torch.device("cpu"))
        if kind == "generate":
            mesh = without_fsdp(mesh)
        sides = [load_model(checkpoint, config, mesh, placement=file) for file in files]
        sides[0] = sides[0]._replace(placed=False)  # its texts go to the ranks in turn
        found[kind] = alternate([partial(measure, one, texts, sizes) for one in sides], sizes.pairs)
    if rank == 0:
        torch.save(found, Path(out, "result"))
    dist.barrier()
    dist.destroy_process_group()


def scores(loaded: Any, texts: list[list[int]], sizes: Sizes) -> list[Any]:
    requests = [Scored(ids[:1], ids[1:]) for ids in texts]
    batches = Batches(sizes.batch, loaded.config.training.seq_len, loaded.mesh, by_router=loaded.placed)
    return [round(value, 1) for value, _ in log_likelihoods(loaded.model, requests, batches)]


def texts_of(loaded: Any, texts: list[list[int]], sizes: Sizes) -> list[Any]:
    prompts = [ids[: sizes.prompt] for ids in texts]
    options = Options(sizes.new, sampling=Sampling(temperature=0.0))
    return [*complete_on_ranks(loaded, prompts, options, sizes.batch)]


def alternate(sides: list[Callable[[], list[Any]]], pairs: int) -> Measured:
    """Seconds of two sides, which all ranks begin together; the first call of each is not counted."""
    results = [side() for side in sides]
    times = []
    for pair in range(pairs):
        spent = {}
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            dist.barrier()
            spent[which] = seconds(sides[which])
        times.append((spent[0], spent[1]))
    same = statistics.fmean(a == b for a, b in zip(*results, strict=True))
    return Measured(times, same)


def rows(run: Path, world: int, sizes: Sizes) -> list[str]:
    """Lines of the table for one run on so many processes."""
    texts = held_out(run, sizes.samples)
    with tempfile.TemporaryDirectory() as name:
        files = placements(run, world, Path(name))
        spawn(work, args=(world, run, files, texts, sizes, name), nprocs=world)
        found: dict[str, Measured] = torch.load(Path(name, "result"), weights_only=False)
    lines = []
    for kind, measured in found.items():
        rates = [sizes.samples / statistics.median(side) for side in zip(*measured.times, strict=True)]
        ratios = [before / after for before, after in measured.times]
        low, high = interval(ratios)
        ratio = f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
        lines.append(
            f"| {run.name} | {world} | {kind} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio} | {measured.same:.3f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories (default: trains two)")
    parser.add_argument("--folder", type=Path, default=Path("runs/paths"), help="where it trains them")
    parser.add_argument("--train-steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=32, help="texts of one measurement")
    parser.add_argument("--batch", type=int, default=4, help="texts of a rank in a batch")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of a prompt")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--toy", action="store_true", help="a tiny model, and two pairs on two processes")
    options = parser.parse_args()
    sizes = Sizes(options.samples, options.batch, options.prompt, options.tokens, options.pairs)
    steps, more, ranks = options.train_steps, [], options.ranks
    if options.toy:
        sizes, steps, more, ranks = Sizes(8, 2, 8, 4, 2), 2, TOY, [2]
    runs = options.runs or train(options.folder, steps, more)
    print(
        f"{sizes.samples} texts, {sizes.batch} of a rank in a batch, {sizes.pairs} pairs; samples per second, medians"
    )
    print(f"| run | processes | what | {SIDES[0]} | {SIDES[1]} | ratio [95% interval] | same results |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        for world in ranks:
            print("\n".join(rows(run, world, sizes)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
