"""A long run watched from outside: memory, file descriptors and threads of every rank, and the disk.

    python scripts/soak.py --steps 2000 [--checkpoint.async_save=false ...]

Two ranks, a checkpoint every 20 steps in the background; other words go to the job. Prints each rank's slope of its own
(anonymous) resident memory over the second half of the run with a 95% interval, and whether descriptors, threads and disk
use stayed as they were. Resident pages of files (code of libraries, mapped tokens) are the system's to give and take: they
are printed, and not judged. Status 0 when nothing grows.
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
GROWTH = 1.0  # MiB per 1,000 steps: in 2,000 less is not told from an allocator that settles (over 6,000 it has)


class Sample(NamedTuple):
    step: int
    own: float
    """MiB of anonymous memory that is resident, shared memory included."""
    files: float
    """MiB of files' pages that are."""
    descriptors: int
    threads: int


def sample(pid: int, step: int) -> Sample:
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    own, files, shared = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile", "RssShmem"))
    return Sample(
        step, own + shared, files, len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))
    )


def disk(run: Path) -> float:
    files = (path for path in (run / "checkpoints").rglob("*") if path.is_file())
    total = 0
    for path in files:
        try:
            total += path.stat().st_size
        except OSError:  # deleted meanwhile
            continue
    return total / MIB


def slope(steps: list[int], values: list[float]) -> tuple[float, float, float]:
    """MiB per 1,000 steps with a 95% interval, by Theil and Sen: the median slope between means over blocks (one sample is much
    like the next), which a few low ones do not bend. TensorBoard's protobuf makes such: now and then it has the allocator
    return all that it keeps, and the process takes it back within a hundred steps."""
    samples = np.array([steps, values], dtype=np.float64).T
    x, y = np.array([block.mean(0) for block in np.array_split(samples, BLOCKS)]).T
    found = theilslopes(y, x / 1000)
    return float(found.slope), float(found.low_slope), float(found.high_slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    options, more = parser.parse_known_args()
    print(f"{options.steps} steps of a small job on 2 ranks in {ROOT}")
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        name = f"soak-{os.getpid()}"
        words = [*SMALL, f"--training.steps={options.steps}", f"--job.output_dir={folder}", f"--job.name={name}"]
        words += ["--checkpoint.interval=20", "--checkpoint.async_save=true", "--validation.interval=200"]
        words += ["--metrics.tensorboard=true", *more]
        process, run = start(words), Path(folder) / name
        seen: dict[str, list[Sample]] = {"0": [], "1": []}
        used: list[float] = []
        while process.poll() is None:
            time.sleep(0.5)
            try:
                step = len(rows(run))
                for rank, pid in processes(name).items():
                    if rank in seen and options.steps // 10 < step < options.steps:  # not while starting or ending
                        seen[rank].append(sample(pid, step))
                used.append(disk(run))
            except OSError:
                continue
        if process.returncode != 0:
            sys.exit("the run failed")
        for rank, samples in seen.items():
            late = samples[len(samples) // 2 :]
            early = samples[: len(samples) // 2]
            rise, low, high = slope([s.step for s in late], [s.own for s in late])
            descriptors, threads = [s.descriptors for s in late], [s.threads for s in late]
            print(
                f"rank {rank}: {late[-1].own:.0f} MiB of its own, {rise:+.2f} ({low:+.2f} to {high:+.2f}) MiB per 1,000 steps; "
                f"descriptors {min(descriptors)} to {max(descriptors)}, threads {min(threads)} to {max(threads)}"
            )
            course = samples[:: max(1, len(samples) // 8)]
            print(f"  over the run, its own: {' '.join(f'{s.own:.1f}' for s in course)} MiB")
            print(f"  over the run, files:   {' '.join(f'{s.files:.1f}' for s in course)} MiB")
            if low > 0.0 and rise > GROWTH:
                bad.append(f"rank {rank}: memory grows")
            # A save has one more for a moment.
            if median(descriptors) > median(s.descriptors for s in early) + 1:
                bad.append(f"rank {rank}: descriptors grow")
            if median(threads) > median(s.threads for s in early) + 1:
                bad.append(f"rank {rank}: threads grow")
        half = len(used) // 2
        print(
            f"checkpoints: at most {max(used[:half]):.1f} MiB in the first half, {max(used[half:]):.1f} MiB in the second"
        )
        if max(used[half:]) > 1.05 * max(used[:half]):
            bad.append("the disk fills")
    print("\n".join(bad) or "nothing grows")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
