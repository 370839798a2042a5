"""Faults of ranks: killed, stuck, with bad numbers of their own; one launcher, two ranks, real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.distributed.test_runs import EXACT, TERMS, assert_same_run, rows, run_train

pytestmark = pytest.mark.slow


def extension(folder: Path, body: str) -> str:
    """Options for a run with a regularizer of the user's, which misbehaves on rank 1 at its `called`-th call."""
    path = folder / "misbehaves.py"
    path.write_text(
        f"""
import os, time
import torch
from titan_moe.extend import Term, register
called = 0

@register
class Misbehaves(Term):
    name = "misbehaves"

    def value(self, view):
        global called
        called += 1
        zero = view.scores_TE.sum() * 0.0
        if called == 20 and os.environ.get("RANK") == "1":
            {body}
        return zero
"""
    )
    return f"--extensions.modules={path}"


CUSTOM = "--regularizers.misbehaves.weight=1.0"


def test_a_bad_number_on_one_rank_stops_all_before_the_update(tiny_options: list[str], tmp_path: Path) -> None:
    words = [*tiny_options, "--training.steps=12", extension(tmp_path, 'return zero + float("nan")'), CUSTOM]
    done = run_train(2, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert "reg/misbehaves is not finite; nothing was updated" in lines[-2]
    assert "first to fail on" in lines[-2]
    assert rows(tmp_path / "runs" / "debug")[-1]["step"] < 12
    logs = [(tmp_path / "runs" / "debug" / "logs" / f"rank-{n}.log").read_text() for n in range(2)]
    assert all("is not finite" in log for log in logs)


def test_a_stuck_rank_is_found_and_its_stack_is_written(tiny_options: list[str], tmp_path: Path) -> None:
    stuck = extension(tmp_path, "time.sleep(1000)")
    began = time.monotonic()
    done = run_train(2, *tiny_options, "--training.steps=12", stuck, CUSTOM, "--parallelism.timeout_seconds=8")
    assert time.monotonic() - began < 150
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a collective failed: all ranks are alive, and one of them is stuck" in done.stderr
    log = (tmp_path / "runs" / "debug" / "logs" / "rank-1.log").read_text()
    assert "misbehaves.py" in log
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout.split()
    assert not left


def test_restarts_go_on_from_the_newest_checkpoint(tiny_options: list[str], tmp_path: Path) -> None:
    """The whole run is what it would have been."""
    words = [*tiny_options, *EXACT, *TERMS, "--training.steps=12", "--checkpoint.interval=2"]
    assert run_train(2, *words, "--job.name=whole").returncode == 0
    mark = tmp_path / "killed"
    body = f"(not os.path.exists({str(mark)!r})) and (open({str(mark)!r}, 'x').close(), os.kill(os.getpid(), 9))"
    harmless = extension(tmp_path, body)
    os.environ["MAX_RESTARTS"] = "1"
    try:
        done = run_train(2, *words, "--job.name=restarted", harmless)
    finally:
        del os.environ["MAX_RESTARTS"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "runs" / "restarted", tmp_path / "runs" / "whole")


def test_random_kills() -> None:
    """Six of them, two while a checkpoint is being written; bitwise the undisturbed run in the end."""
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--kills=6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, 72 steps, 0 differences" in done.stdout


def test_signals_to_the_launcher_save_on_all_ranks(tiny_options: list[str], tmp_path: Path) -> None:
    words = [*tiny_options, "--training.steps=400", "--checkpoint.interval=0", "--validation.interval=0"]
    environment = {**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1"}
    run = tmp_path / "runs" / "debug"
    process = subprocess.Popen(
        [str(ROOT / "run_train.sh"), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 4:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "the same command goes on from there" in out
    (saved,) = (run / "checkpoints").glob("step-*")
    assert json.loads((saved / "state.json").read_text())["step"] == int(saved.name[5:])
