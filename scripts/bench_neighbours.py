"""Seconds a step of the default job, alone and beside one busy process, with several settings of OpenMP's threads.

    python scripts/bench_neighbours.py
    python scripts/bench_neighbours.py --rounds 3 --settings "OMP_PROC_BIND=false" "" "GOMP_SPINCOUNT=10000"

Every round runs each setting alone and beside the busy process, one after the other; the first setting is the baseline.
A setting is a list of environment variables; "" is the default. A time is the median of a run's steps without the first
ones, and the table has medians over rounds. Other OMP_* and GOMP_* variables of the caller are removed. Nothing else
should run on the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarking import interval

SETTINGS = [
    "OMP_PROC_BIND=false",  # threads where the scheduler puts them
    "",
    "OMP_PROC_BIND=false GOMP_SPINCOUNT=20000",
    "OMP_WAIT_POLICY=passive",
    "OMP_NUM_THREADS=1",
]
FIRST_STEPS = 3  # memory is allocated, kernels are compiled
BUSY = "while True: pass"


def step_seconds(setting: str, steps: int, folder: Path, name: str) -> float:
    """The median step of a run of the default job."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment |= dict(word.split("=", 1) for word in setting.split())
    options = [
        f"--training.steps={steps}",
        f"--job.output_dir={folder}",
        f"--job.name={name}",
        "--metrics.tensorboard=false",
    ]
    options += ["--validation.interval=0", "--validation.sequences=1", "--checkpoint.interval=0"]
    command = [sys.executable, "-m", "titan_moe.cli", "train", "--config", "debug", *options]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["step_seconds"] for row in rows if row["kind"] == "train"]
    return statistics.median(seconds[FIRST_STEPS:])


def beside_busy(setting: str, steps: int, folder: Path, name: str) -> float:
    """The same while another process computes all the time."""
    busy = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        return step_seconds(setting, steps, folder, name)
    finally:
        busy.kill()
        busy.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {setting: [] for setting in arguments.settings}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step_seconds("", FIRST_STEPS + 1, folder, "prepare")  # text and kernels into the cache
        for number in range(arguments.rounds):
            for setting, times in found.items():
                run = f"{number}-{len(list(folder.iterdir()))}"
                alone = step_seconds(setting, arguments.steps, folder, f"{run}-alone")
                times.append((alone, beside_busy(setting, arguments.steps, folder, f"{run}-beside")))
                print(
                    f"{setting or 'default':<45} alone {alone * 1e3:6.0f} ms, beside {times[-1][1] * 1e3:6.0f} ms",
                    flush=True,
                )
    baseline = [alone for alone, _ in found[arguments.settings[0]]]
    print(f"\n{'setting':<45} alone/baseline  (interval)      of its speed alone that is kept beside")
    for setting, times in found.items():
        slower = [alone / base for (alone, _), base in zip(times, baseline, strict=True)]
        kept = [alone / beside for alone, beside in times]
        low, high = interval(slower)
        ratio = f"{statistics.median(slower):6.3f} ({low:.3f} to {high:.3f})"
        print(f"{setting or 'default':<45} {ratio}   {statistics.median(kept):.2f}")


if __name__ == "__main__":
    main()
