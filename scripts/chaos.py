"""Kills a 2-rank training run many times, and compares its metrics with those of an undisturbed run.

    python scripts/chaos.py --kills 50

SIGKILL goes to a random rank, or to all ranks and the launcher, at a random time; every third time while a checkpoint
is being written. Then the same command resumes the run. In the end metrics.jsonl must have every step once, bitwise
equal to the undisturbed run except for timing and memory. Status 0 if so.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("tokens_per_second", "step_seconds", "mfu", "memory_gib")
LAUNCHER = "titan_moe.runtime.launch"
SMALL = [
    "--model.dim=128",
    "--model.layers=3",
    "--training.batch_size=4",
    "--training.seq_len=128",
    "--validation.sequences=4",
    "--validation.interval=10",
    "--checkpoint.interval=3",
    "--metrics.tensorboard=false",
]
SECONDS = 180  # to wait for any single event


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "run_train.sh"), *words]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=quiet, stderr=pipe, text=True, start_new_session=True)


def processes(name: str) -> dict[str, int]:
    """Process ids of the run, by rank ("0", "1") or LAUNCHER."""
    ids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if f"--job.name={name}" not in words:
                continue
            if LAUNCHER in words:
                ids[LAUNCHER] = int(folder.name)
            elif "titan_moe.cli" in words and "--check" not in words:
                settings = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                rank = next((s.partition("=")[2] for s in settings if s.startswith("RANK=")), None)
                if rank is not None:
                    ids[rank] = int(folder.name)
    return ids


def rows(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_until(reached: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while process.poll() is None and not reached():
        if time.monotonic() > end:
            raise SystemExit("the run did not continue within the time limit")
        time.sleep(0.0005)


def kill_once(words: list[str], run: Path, name: str, random_source: random.Random, writing: bool) -> str | None:
    """Starts the run and kills it. Describes the kill; None when the run finished first."""
    rows_before = len(rows(run))
    process = start(words)
    # When the run resumes, it first removes the rows after its newest checkpoint.
    wait_until(lambda: len(processes(name)) == 3, process)
    began = time.time()
    newest = run / "metrics.jsonl"
    wait_until(lambda: newest.exists() and newest.stat().st_mtime > began and len(rows(run)) > 0, process)
    if writing:
        wait_until(lambda: any((run / "checkpoints").glob(".step-*")), process)
        time.sleep(random_source.uniform(0, 0.03))
    else:
        time.sleep(random_source.uniform(0, 2.5))
    running = processes(name)
    victims = (
        sorted(running)
        if random_source.random() < 1 / 3
        else [random_source.choice(sorted(set(running) - {LAUNCHER}) or ["none"])]
    )
    half_written = any((run / "checkpoints").glob(".step-*"))
    for victim in victims:
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(running[victim], signal.SIGKILL)
    process.wait(SECONDS)
    if process.returncode == 0:
        return None
    end = time.monotonic() + SECONDS
    while processes(name):  # ranks whose launcher was killed still have to exit
        if time.monotonic() > end:
            raise SystemExit("a process did not exit")
        time.sleep(0.05)
    killed = "all" if len(victims) > 1 else f"rank {victims[0]}"
    during = ", during a checkpoint" if half_written else ""
    return f"{killed} after {len(rows(run))} rows ({rows_before} before the start){during}"


def finish(words: list[str]) -> None:
    process = start(words)
    _, errors = process.communicate(timeout=1800)
    if process.returncode != 0:
        raise SystemExit(f"the run failed: {errors}")


def differences(undisturbed: list[dict[str, Any]], disturbed: list[dict[str, Any]]) -> list[str]:
    """All differences between the rows of both runs, as text."""
    problems = []
    keys = [(row["kind"], row["step"]) for row in disturbed]
    problems += [f"{key} occurs {count} times" for key, count in Counter(keys).items() if count > 1]
    by_key = {(row["kind"], row["step"]): row for row in disturbed}
    for row in undisturbed:
        key = (row["kind"], row["step"])
        other = by_key.get(key)
        if other is None:
            problems.append(f"{key} is missing")
            continue
        problems += [
            f"{key}: {name} {value} became {other.get(name)}"
            for name, value in row.items()
            if name not in TIMED and other.get(name) != value
        ]
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=0, help="0: twelve per kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="more options of the run, after --")
    options = parser.parse_args()
    random_source = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        steps = options.steps or 12 * options.kills
        common = [*SMALL, f"--training.steps={steps}", f"--job.output_dir={folder}", *options.options]
        name = f"chaos-{os.getpid()}"
        finish([*common, "--job.name=calm"])
        words, run = [*common, f"--job.name={name}"], Path(folder) / name
        kills = 0
        while kills < options.kills:
            killed = kill_once(words, run, name, random_source, writing=kills % 3 == 2)
            if killed is None:
                raise SystemExit(f"the run finished after {kills} kills; give more --steps")
            kills += 1
            print(f"kill {kills}: {killed}", flush=True)
        finish(words)
        problems = differences(rows(Path(folder) / "calm"), rows(run))
        renamed = len(list((run / "checkpoints").glob("aside-*")))
    print("\n".join(problems[:20]))
    print(f"{options.kills} kills, {steps} steps, {len(problems)} differences, {renamed} checkpoints set aside")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
