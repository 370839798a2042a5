"""CPUs that a process may use: its affinity, and limits of control groups of both versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from titan_moe.runtime.cpus import affinity, available_cpus, cgroup_cpus

TREES = {
    "version 2": ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, of a group around it": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000"}, 2),
    "version 2, in a container": ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
    "version 2, the path is the host's": ("0::/docker/12ab\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "version 2, outside this container's groups": ("0::/../other\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "version 1": (
        "4:cpu,cpuacct:/job\n3:memory:/x\n",
        {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"},
        4,
    ),
    "version 1, no limit": ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
    "no groups": ("", {}, float("inf")),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_limits_of_control_groups(name: str, tmp_path: Path) -> None:
    own, files, cpus = TREES[name]
    (tmp_path / "own").write_text(own)
    mounted = tmp_path / "mounted"
    for file, text in files.items():
        (mounted / file).parent.mkdir(parents=True, exist_ok=True)
        (mounted / file).write_text(text)
    assert cgroup_cpus(tmp_path / "own", mounted) == cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_affinity_limits_cpus() -> None:
    one = min(os.sched_getaffinity(0))
    code = "from titan_moe.runtime.cpus import available_cpus; print(available_cpus())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )
    assert done.stdout == "1\n"


def test_there_is_always_a_cpu() -> None:
    assert 1 <= available_cpus() <= affinity()


@pytest.fixture
def small_group():
    """A control group of version 1 with the time of one CPU; yields its directory."""
    group = Path("/sys/fs/cgroup/cpu") / f"titan-moe-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError:
        pytest.skip("needs root and control groups of version 1, to make one")
    yield group
    group.rmdir()


def test_threads_in_a_container_with_one_cpu(small_group: Path) -> None:
    """torch would take a thread per CPU of the machine."""
    code = "from titan_moe.runtime.cpus import limit_threads; limit_threads(); import os; print(os.environ['OMP_NUM_THREADS'])"
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for given, threads in (({}, "1" if affinity() > 1 else None), ({"OMP_NUM_THREADS": "3"}, "3")):
        if threads is None:
            continue
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > {small_group}/cgroup.procs; exec "$@"', "-", sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=variables | given,
            check=True,
        )
        assert done.stdout == f"{threads}\n"
