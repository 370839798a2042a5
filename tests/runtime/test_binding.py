"""OpenMP threads that are bound to CPUs, seen in /proc of another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from titan_moe.runtime.binding import CHOICES, _places
from titan_moe.runtime.cpus import ALLOWED

CODE = """
import json, os, threading
import torch
from titan_moe.runtime.binding import bind_threads
from titan_moe.runtime.cpus import affinity, use_all_cpus

def cpus_of_threads():
    return sorted(sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task"))

torch.ones(1 << 20).add_(1)
before = cpus_of_threads()
bound = bind_threads()
torch.ones(1 << 20).add_(1)  # by the same threads
after = cpus_of_threads()
unbound = []
thread = threading.Thread(target=lambda: (use_all_cpus(), unbound.extend(os.sched_getaffinity(0))))
thread.start()
thread.join()
print(json.dumps([bound, before, after, sorted(unbound), affinity()]))
"""
several_cpus = pytest.mark.skipif(not ALLOWED or len(ALLOWED) < 2, reason="needs Linux and two CPUs")


def threads(**variables: str) -> list:
    """Whether CODE bound its threads, the CPUs of each before and after, those of an unbound thread, and their number."""
    environment = {name: value for name, value in os.environ.items() if name not in (*CHOICES, "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment | variables, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@several_cpus
def test_each_thread_has_a_cpu_of_its_own() -> None:
    count = len(ALLOWED)
    bound, before, after, unbound, affinity = threads(OMP_NUM_THREADS=str(count))
    assert bound
    assert before.count(sorted(ALLOWED)) == len(before)
    assert all([cpu] in after for cpu in ALLOWED)
    assert unbound == sorted(ALLOWED)
    assert affinity == count


@several_cpus
@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_NUM_THREADS": "1"},  # CPUs are free: the scheduler finds one
        {"OMP_PROC_BIND": "false"},
        {"OMP_WAIT_POLICY": "passive"},  # threads that wait do not spin
        {"LOCAL_WORLD_SIZE": "2"},  # more threads than CPUs
    ],
)
def test_threads_stay_free(variables: dict[str, str]) -> None:
    bound, before, after, *_ = threads(**{"OMP_NUM_THREADS": str(len(ALLOWED)), **variables})
    assert not bound
    assert before == after


@several_cpus
def test_ranks_of_a_node_share_its_cpus() -> None:
    count = len(ALLOWED) // 2
    if count < 2:
        pytest.skip("needs four CPUs for two ranks with two threads each")
    seen = []
    for rank in "01":
        bound, _, after, *_ = threads(OMP_NUM_THREADS=str(count), LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
        assert bound
        seen += [cpus[0] for cpus in after if len(cpus) == 1]
    assert sorted(seen) == sorted(ALLOWED)[: 2 * count]


def test_hardware_threads_of_a_core_share_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_moe.runtime.binding.ALLOWED", frozenset(range(4)))
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert _places(2, tmp_path) == [[0, 2], [1, 3]]
    assert _places(4, tmp_path) == [[0], [1], [2], [3]]
    assert _places(3, tmp_path) == []
