"""The cost of checkpoints: how long a synchronous and a background save stop training, and the time to load.

    python scripts/bench_checkpoints.py
    python scripts/bench_checkpoints.py --dim 1024 --layers 8

`pause` is the time that `Saver.save` takes before training continues. `slowdown` is the time of a step while the
background thread writes, divided by that of other steps. `load` is the time to verify and load a checkpoint, divided by
that to read and hash its bytes once in one thread. Medians; the page cache is warm.
"""

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

    def save_seconds(self, saver: Saver) -> float:
        """Seconds that a save stops training."""
        self.step += 1
        return seconds(lambda: saver.save(self.step, {}))

    def background_save(self, saver: Saver) -> tuple[float, list[float]]:
        """The same, and the times of the steps while the background thread writes."""
        pauses = self.save_seconds(saver)
        steps = []
        while saver.pending is not None and not saver.pending.done():
            steps.append(seconds(self.train))
        saver.finish()
        return pauses, steps

    def load_seconds(self) -> tuple[float, float]:
        """Seconds to verify and load the newest checkpoint, and to read and hash its bytes."""
        newest = self.run_dir.newest()
        assert newest is not None

        def find_and_load() -> None:
            newest_undamaged = newest_good(self.run_dir, single(torch.device("cpu")), start_over=False)
            assert newest_undamaged is not None
            load_checkpoint(newest_undamaged, self.model, self.optimizer)

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
    parser.add_argument("--folder", default=None, help="a directory on the disk to measure")
    options = parser.parse_args()
    keep_freed_memory()
    folder = tempfile.mkdtemp(dir=options.folder)
    try:
        bench = Bench(folder, options.dim, options.layers)
        undisturbed = [seconds(bench.train) for _ in range(options.repeats + 2)][2:]
        synchronous = Saver(bench.run_dir, bench.model, bench.optimizer, Checkpoint(keep=2, interval=1))
        background = Saver(bench.run_dir, bench.model, bench.optimizer, Checkpoint(keep=2, interval=1, async_save=True))
        bench.background_save(background)  # allocates the copies
        pauses, writes, disturbed = [], [], []
        for _ in range(options.repeats):
            writes.append(bench.save_seconds(synchronous))
            one, steps = bench.background_save(background)
            pauses.append(one)
            disturbed += steps
        loads = [bench.load_seconds() for _ in range(options.repeats)]
        newest = bench.run_dir.newest()
        assert newest is not None
        parameters = sum(p.numel() for p in bench.model.parameters())
        print(f"{parameters / 1e6:.0f} million parameters, {size_of(newest) / 2**30:.2f} GiB a checkpoint")
    finally:
        shutil.rmtree(folder)
    step_seconds = statistics.median(undisturbed)
    print("| what | ratio |")
    print("|---|---|")
    print(f"| pause, background / synchronous | {statistics.median(pauses) / statistics.median(writes):.3f} |")
    print(f"| pause, synchronous / a training step | {statistics.median(writes) / step_seconds:.1f} |")
    print(f"| slowdown during a background save | {statistics.median(disturbed) / step_seconds:.2f} |")
    print(f"| load / read and hash | {statistics.median(a / b for a, b in loads):.2f} |")


if __name__ == "__main__":
    main()
