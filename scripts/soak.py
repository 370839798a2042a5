"""A long training run, observed from outside: memory, file descriptors and threads of every rank, and disk use.

    python scripts/soak.py --steps 2000 [--checkpoint.async_save=false ...]

Two ranks, a background checkpoint every 20 steps; further options go to the job. Prints for each rank how fast its
anonymous resident memory grows in the second half of the run, with a 95% interval, and whether descriptors, threads and
disk use grow. Resident pages of files (libraries, mapped token shards) are printed only, since the kernel adds and
drops them. Status 0 when nothing grows.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from chaos import ROOT, SMALL, processes, rows, start
from scipy.stats import theilslopes

MIB = 2**20
BLOCKS = 20
GROWTH = (
    1.0  # MiB per 1,000 steps; less can't be distinguished from an allocator that is still settling after 2,000 steps
)


class Sample(NamedTuple):
    """One process at one time."""

    step: int
    anonymous: float
    """MiB of resident anonymous and shared memory."""
    files: float
    """MiB of resident pages of files."""
    descriptors: int
    threads: int


def sample(pid: int, step: int) -> Sample:
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    anonymous, files, shared = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile", "RssShmem"))
    return Sample(
        step, anonymous + shared, files, len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))
    )


def disk(run: Path) -> float:
    """MiB of all checkpoints."""
    files = (path for path in (run / "checkpoints").rglob("*") if path.is_file())
    total = 0
    for path in files:
        try:
            total += path.stat().st_size
        except OSError:  # deleted since it was listed
            continue
    return total / MIB


def slope(steps: list[int], values: list[float]) -> tuple[float, float, float]:
    """Growth in MiB per 1,000 steps and its 95% interval: the Theil-Sen slope of means over blocks.

    Blocks, because consecutive samples are correlated. Theil-Sen, because it is robust to a few low values: now and
    then TensorBoard's protobuf makes the allocator return its free memory, which the process takes back within a
    hundred steps."""
    samples = np.array([steps, values], dtype=np.float64).T
    x, y = np.array([block.mean(0) for block in np.array_split(samples, BLOCKS)]).T
    fit = theilslopes(y, x / 1000)
    return float(fit.slope), float(fit.low_slope), float(fit.high_slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    options, more = parser.parse_known_args()
    print(f"{options.steps} steps of a small job on 2 ranks in {ROOT}")
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        name = f"soak-{os.getpid()}"
        words = [*SMALL, f"--training.steps={options.steps}", f"--job.output_dir={folder}", f"--job.name={name}"]
        words += ["--checkpoint.interval=20", "--checkpoint.async_save=true", "--validation.interval=200"]
        words += ["--metrics.tensorboard=true", *more]
        process, run = start(words), Path(folder) / name
        by_rank: dict[str, list[Sample]] = {"0": [], "1": []}
        used: list[float] = []
        while process.poll() is None:
            time.sleep(0.5)
            try:
                step = len(rows(run))
                for rank, pid in processes(name).items():
                    if rank in by_rank and options.steps // 10 < step < options.steps:  # neither start-up nor shut-down
                        by_rank[rank].append(sample(pid, step))
                used.append(disk(run))
            except OSError:
                continue
        if process.returncode != 0:
            sys.exit("the run failed")
        for rank, samples in by_rank.items():
            second_half = samples[len(samples) // 2 :]
            first_half = samples[: len(samples) // 2]
            rise, low, high = slope([s.step for s in second_half], [s.anonymous for s in second_half])
            descriptors, threads = [s.descriptors for s in second_half], [s.threads for s in second_half]
            print(
                f"rank {rank}: {second_half[-1].anonymous:.0f} MiB anonymous, "
                f"{rise:+.2f} ({low:+.2f} to {high:+.2f}) MiB per 1,000 steps; "
                f"descriptors {min(descriptors)} to {max(descriptors)}, threads {min(threads)} to {max(threads)}"
            )
            shown = samples[:: max(1, len(samples) // 8)]
            print(f"  over the run, anonymous: {' '.join(f'{s.anonymous:.1f}' for s in shown)} MiB")
            print(f"  over the run, files:     {' '.join(f'{s.files:.1f}' for s in shown)} MiB")
            if low > 0.0 and rise > GROWTH:
                problems.append(f"rank {rank}: memory grows")
            # During a save there is one more.
            if median(descriptors) > median(s.descriptors for s in first_half) + 1:
                problems.append(f"rank {rank}: descriptors grow")
            if median(threads) > median(s.threads for s in first_half) + 1:
                problems.append(f"rank {rank}: threads grow")
        half = len(used) // 2
        print(
            f"checkpoints: at most {max(used[:half]):.1f} MiB in the first half, "
            f"{max(used[half:]):.1f} MiB in the second"
        )
        if max(used[half:]) > 1.05 * max(used[:half]):
            problems.append("disk use grows")
    print("\n".join(problems) or "nothing grows")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
