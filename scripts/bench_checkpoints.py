"""What saving and loading cost: the standstill of a checkpoint written in the step and of one written behind it, and
loading.

    python scripts/bench_checkpoints.py
    python scripts/bench_checkpoints.py --dim 1024 --layers 8

`standstill` is the time that `Saver.save` keeps the training from going on; `slower` is a step while the writer runs
over a step while it does not; `load` is verifying and loading a checkpoint over reading and hashing its bytes once, in
one thread. Medians; the page cache is warm."""

import argparse
import hashlib
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from benchmarking import VOCABULARY, inputs_of, seconds
from torch import nn

from titan_moe.checkpoint.dcp import load_checkpoint
from titan_moe.checkpoint.resume import newest_good
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.checkpoint.saver import Saver
from titan_moe.config.load import load_config
from titan_moe.config.tables import Checkpoint, Optimizer
from titan_moe.model.init import init_weights
from titan_moe.model.terms import terms_of
from titan_moe.model.transformer import Transformer
from titan_moe.optim import build_optimizer
from titan_moe.parallel.mesh import single
from titan_moe.runtime.allocator import keep_freed_memory


class Bench:
    def __init__(self, folder: str, dim: int, layers: int) -> None:
        config = load_config("debug", [f"--model.dim={dim}", f"--model.layers={layers}", f"--job.output_dir={folder}"])
        settings = config.model.model_copy(update={"vocab_size": VOCABULARY})
        self.model = Transformer(settings, terms_of(config), torch.float32)
        init_weights(self.model, seed=0)
        self.optimizer = build_optimizer(self.model, Optimizer())
        self.inputs = inputs_of(2, 256)
        self.run_dir = RunDir(config)
        self.run_dir.open()
        self.step = 0

    def train(self) -> None:
        out = self.model(self.inputs)
        (out.ce + self.model.terms.objective(out.carry.terms)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved(self, saver: Saver) -> float:
        """Seconds that a save holds the training up."""
        self.step += 1
        return seconds(lambda: saver.save(self.step, {}))

    def behind(self, saver: Saver) -> tuple[float, list[float]]:
        """The same, and the times of the steps while the writer runs."""
        held = self.saved(saver)
        steps = []
        while saver.pending is not None and not saver.pending.done():
            steps.append(seconds(self.train))
        saver.finish()
        return held, steps

    def loading(self) -> tuple[float, float]:
        """Seconds to find and load the newest checkpoint, and to read and hash its bytes."""
        newest = self.run_dir.newest()
        assert newest is not None

        def find_and_load() -> None:
            found = newest_good(self.run_dir, single(torch.device("cpu")))
            assert found is not None
            load_checkpoint(found, self.model, self.optimizer)

        def read_and_hash() -> None:
            for path in newest.iterdir():
                with path.open("rb") as file:
                    digest = hashlib.sha256()
                    while block := file.read(1 << 22):
                        digest.update(block)

        return seconds(find_and_load), seconds(read_and_hash)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to be measured")
    options = parser.parse_args()
    keep_freed_memory()
    folder = tempfile.mkdtemp(dir=options.folder)
    try:
        bench = Bench(folder, options.dim, options.layers)
        quiet = [seconds(bench.train) for _ in range(options.repeats + 2)][2:]
        now = Saver(bench.run_dir, bench.model, bench.optimizer, Checkpoint(keep=2, interval=1))
        later = Saver(bench.run_dir, bench.model, bench.optimizer, Checkpoint(keep=2, interval=1, async_save=True))
        bench.behind(later)  # makes the copies' memory
        held, whole, during = [], [], []
        for _ in range(options.repeats):
            whole.append(bench.saved(now))
            one, steps = bench.behind(later)
            held.append(one)
            during += steps
        loads = [bench.loading() for _ in range(options.repeats)]
        newest = bench.run_dir.newest()
        assert newest is not None
        parameters = sum(p.numel() for p in bench.model.parameters())
        print(f"{parameters / 1e6:.0f} million parameters, {size_of(newest) / 2**30:.2f} GiB a checkpoint")
    finally:
        shutil.rmtree(folder)
    whole_step = statistics.median(quiet)
    print("| what | ratio |")
    print("|---|---|")
    print(f"| standstill behind / in the step | {statistics.median(held) / statistics.median(whole):.3f} |")
    print(f"| in the step / a training step | {statistics.median(whole) / whole_step:.1f} |")
    print(f"| slower while the writer runs | {statistics.median(during) / whole_step:.2f} |")
    print(f"| load / read and hash | {statistics.median(a / b for a, b in loads):.2f} |")


if __name__ == "__main__":
    main()
