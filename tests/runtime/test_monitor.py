"""A rank that waits for its device learns of lost ranks from a thread. Real processes; a sleep stands for the device."""

import socket
import subprocess
import sys

import pytest

from tests.helpers.commands import environment

RANK = """
import os, signal, sys, time
import torch
from titan_moe.parallel.mesh import start_processes
from titan_moe.runtime.heartbeat import Heartbeat
from titan_moe.runtime.monitor import monitored

start_processes(torch.device("cpu"), 60)
heartbeat = Heartbeat()
with monitored(heartbeat, seconds=5.0):
    exec(sys.argv[1] if heartbeat.rank == 1 else sys.argv[2])
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
WAITS = "time.sleep(60)"


def run(first: str, second: str) -> list[subprocess.CompletedProcess[str]]:
    """Both ranks, which run a statement each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        variables["MASTER_ADDR"] = "127.0.0.1"
        command = [sys.executable, "-c", RANK, second, first]
        env = environment() | {name: str(value) for name, value in variables.items()}
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env))
    errors = [process.communicate(timeout=50)[1] for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, stderr=text)
        for process, text in zip(processes, errors, strict=True)
    ]


@pytest.mark.slow
def test_a_killed_rank_is_named() -> None:
    first, _ = run(WAITS, KILLED)
    assert first.returncode == 1
    (line,) = [line for line in first.stderr.splitlines() if line.startswith("error:")]
    assert line == f"error: rank 1 on {socket.gethostname()} is gone: no sign of life for 5 s"


@pytest.mark.slow
def test_the_rank_with_the_store_is_named() -> None:
    _, second = run(KILLED, WAITS)
    assert second.returncode == 1
    assert "error: rank 0, or the launcher, whose store says which ranks are alive, has ended" in second.stderr


@pytest.mark.slow
def test_a_failure_that_a_rank_tells_is_passed_on() -> None:
    first, _ = run(WAITS, "heartbeat.tell(ValueError('a reason')); time.sleep(4)")
    assert first.returncode == 1
    assert "error: rank 1 failed: ValueError: a reason" in first.stderr


@pytest.mark.slow
def test_a_rank_that_ends_before_others_is_not_lost() -> None:
    first, second = run("time.sleep(9)", "pass")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
