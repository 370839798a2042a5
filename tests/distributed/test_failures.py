"""Failures of real ranks: killed, stuck, non-finite values; one launcher, two ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.rank_runs import EXACT, TERMS, assert_same_run, rows, run_train
from tests.helpers.runs import Make, train

pytestmark = pytest.mark.slow


def extension(folder: Path, body: str) -> str:
    """An option that adds a regularizer, which runs the statement `body` on rank 1 at its 20th call."""
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


def processes_of(folder: Path) -> list[str]:
    """Ids of processes with this folder on their command line."""
    return subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False).stdout.split()


def test_a_non_finite_value_on_one_rank_stops_all_ranks_before_the_update(
    tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--training.steps=12", extension(tmp_path, 'return zero + float("nan")'), CUSTOM]
    done = run_train(2, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert "reg/misbehaves is not finite; nothing was updated" in lines[-2]
    assert "first to fail on" in lines[-2]
    assert rows(tmp_path / "runs" / "debug")[-1]["step"] < 12
    logs = [(tmp_path / "runs" / "debug" / "logs" / f"rank-{n}.log").read_text() for n in range(2)]
    assert all("is not finite" in log for log in logs)


@pytest.mark.parametrize(
    ("body", "status", "last"),
    [
        ('raise ValueError("my mistake")', 1, "rank 1 failed, status 1: ValueError: my mistake"),
        ("os.kill(os.getpid(), 9)", 137, "rank 1 died of SIGKILL"),
        ("os.kill(os.getpid(), 11)", 139, "rank 1 died of SIGSEGV"),
    ],
    ids=["exception", "killed", "crashed"],
)
def test_the_first_failing_rank_is_reported_last_and_sets_the_exit_status(
    tiny_options: list[str], tmp_path: Path, body: str, status: int, last: str
) -> None:
    done = run_train(2, *tiny_options, "--training.steps=12", extension(tmp_path, body), CUSTOM)
    assert done.returncode == status, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-2].startswith("error: first to fail on ")
    assert lines[-2].endswith(last)
    assert lines[-1].endswith("logs/rank-1.log")
    assert "torch/distributed/elastic" not in done.stderr  # torchrun's own report
    assert not processes_of(tmp_path)


def test_a_rank_that_waits_for_the_others_in_vain_says_so(tiny_options: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "titan_moe.cli", "train", *tiny_options, "--parallelism.timeout_seconds=2"],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: not all ranks started within 2 s: ")


def test_a_stuck_rank_is_reported_and_its_stack_is_written(tiny_options: list[str], tmp_path: Path) -> None:
    stuck = extension(tmp_path, "time.sleep(1000)")
    began = time.monotonic()
    done = run_train(2, *tiny_options, "--training.steps=12", stuck, CUSTOM, "--parallelism.timeout_seconds=8")
    assert time.monotonic() - began < 150
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a collective failed: all ranks are alive, and one of them is stuck" in done.stderr.splitlines()[-2]
    log = (tmp_path / "runs" / "debug" / "logs" / "rank-1.log").read_text()
    assert "misbehaves.py" in log
    assert not processes_of(tmp_path)


def test_a_restarted_run_equals_an_undisturbed_one_of_one_process(
    tiny_options: list[str], tiny_config: Make, tmp_path: Path
) -> None:
    mark = tmp_path / "killed"
    body = f"(not os.path.exists({str(mark)!r})) and (open({str(mark)!r}, 'x').close(), os.kill(os.getpid(), 9))"
    words = [*EXACT, *TERMS, "--regularizers.lb.scope=sequence", "--training.steps=12", "--checkpoint.interval=2"]
    words += [extension(tmp_path, body), CUSTOM]
    train(tiny_config(*words, "--job.name=reference"))
    assert not mark.exists()
    done = run_train(2, *tiny_options, *words, "--job.name=restarted", MAX_RESTARTS="1")
    assert mark.exists()
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "runs" / "restarted", tmp_path / "runs" / "reference")


def test_random_kills() -> None:
    """Six of them, two while a checkpoint is being written; the rows are bitwise those of an undisturbed run."""
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--kills=6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, 72 steps, 0 differences" in done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_run_train_saves_on_all_ranks(
    tiny_options: list[str], tmp_path: Path, number: int, status: int
) -> None:
    words = [*tiny_options, "--training.steps=400", "--checkpoint.interval=0", "--validation.interval=0"]
    run = tmp_path / "runs" / "debug"
    process = start_and_wait_for_rows(words, run, ignored=[])
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "the same command goes on from there" in out
    assert not errors
    (saved,) = (run / "checkpoints").glob("step-*")
    assert json.loads((saved / "state.json").read_text())["step"] == int(saved.name[5:])


def test_sighup_is_ignored_under_nohup(tiny_options: list[str], tmp_path: Path) -> None:
    words = [*tiny_options, "--training.steps=400", "--checkpoint.interval=0", "--validation.interval=0"]
    run = tmp_path / "runs" / "debug"
    process = start_and_wait_for_rows(words, run, ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    known = len(rows(run))
    wait_for_rows(run, known + 5, process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143


def start_and_wait_for_rows(words: list[str], run: Path, ignored: list[signal.Signals]) -> subprocess.Popen[str]:
    """run_train.sh on two ranks after its first steps. ignored: signals that its parent has set to be ignored."""

    def set_signals() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have used nohup
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    process = subprocess.Popen(
        [str(ROOT / "run_train.sh"), *words],
        env={**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=set_signals,
    )
    wait_for_rows(run, 4, process)
    return process


def wait_for_rows(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < count:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
