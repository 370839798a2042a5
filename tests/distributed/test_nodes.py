"""Two nodes: network namespaces of this machine, each with its own address and host name and two ranks."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.rank_runs import EXACT, TERMS, assert_same_run
from tests.helpers.runs import Make, train

ADDRESSES = {"node-a": "10.213.7.1", "node-b": "10.213.7.2"}
SECONDS = 15  # after which a collective fails
ONE_PROCESS = [*EXACT, *TERMS, "--training.steps=6", "--regularizers.lb.scope=sequence"]
WORDS = [*ONE_PROCESS, "--parallelism.ep=2"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def namespaces_work() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        ip("netns", "del", name)
    return made


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not namespaces_work(), reason="needs root and ip netns, for nodes with their own network"),
]


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """Names of the two namespaces by host name; an interface pair named `cable` connects them."""
    spaces = {host: f"titan-{host}-{os.getpid()}" for host in ADDRESSES}
    first, second = spaces.values()
    try:
        for space in spaces.values():
            ip("netns", "add", space)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for host, space in spaces.items():
            ip("-n", space, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "cable")
            ip("-n", space, "link", "set", "cable", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield spaces
    finally:
        for space in spaces.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", space)


def start(host: str, space: str, words: list[str], **environment: str) -> subprocess.Popen[str]:
    settings = {
        "NPROC": "2",
        "NNODES": "2",
        "NODE_RANK": str(list(ADDRESSES).index(host)),
        "RDZV_ENDPOINT": f"{ADDRESSES['node-a']}:29611",
        "GLOO_SOCKET_IFNAME": "cable",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    # The host name has a namespace of its own. It resolves nowhere, as on many clusters.
    inside = f'hostname {host} && exec "$@"'
    command = ["ip", "netns", "exec", space, "unshare", "--uts", "bash", "-c", inside, "-", str(ROOT / "run_train.sh")]
    return subprocess.Popen(
        [*command, *words],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(metrics: Path, count: int, processes: dict[str, subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes.values())
        time.sleep(0.1)


def ranks_in(space: str) -> list[int]:
    """Process ids of the ranks in a namespace."""
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=True).stdout
    return [pid for pid in map(int, found.split()) if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]


@contextlib.contextmanager
def started(nodes: dict[str, str], words: list[str], **environment: str) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """run_train.sh on both nodes; kills what is left of them at the end."""
    processes = {host: start(host, space, words, **environment) for host, space in nodes.items()}
    try:
        yield processes
    finally:
        for space in nodes.values():
            found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=True).stdout
            for pid in map(int, found.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        for process in processes.values():
            process.communicate()


def test_two_nodes_train_as_one_process_does(
    nodes: dict[str, str], tiny_options: list[str], tiny_config: Make, tmp_path: Path
) -> None:
    train(tiny_config(*ONE_PROCESS, "--job.name=one-process"))
    with started(nodes, [*tiny_options, *WORDS, "--job.name=two-nodes"]) as processes:
        for host, process in processes.items():
            output, errors = process.communicate(timeout=200)
            assert process.returncode == 0, f"{host}: {output}{errors}"
    assert_same_run(tmp_path / "runs" / "two-nodes", tmp_path / "runs" / "one-process")


def test_a_lost_node_is_named(nodes: dict[str, str], tiny_options: list[str], tmp_path: Path) -> None:
    """The network between the nodes goes down: no process dies and no connection closes."""
    words = [
        *tiny_options,
        *WORDS,
        "--training.steps=100000",
        "--job.name=cut",
        f"--parallelism.timeout_seconds={SECONDS}",
    ]
    metrics = tmp_path / "runs" / "cut" / "metrics.jsonl"
    with started(nodes, words) as processes:
        wait_for_rows(metrics, 5, processes)
        ip("-n", nodes["node-a"], "link", "set", "cable", "down")
        cut = time.monotonic()
        output, errors = processes["node-a"].communicate(timeout=120)
        assert time.monotonic() - cut < SECONDS + 45
        assert processes["node-a"].returncode == 1, output + errors
        last = errors.strip().splitlines()[-2]
        assert re.search(r"first to fail on node-a: rank [01] failed, status 1: a collective failed: ", last), errors
        assert "node node-b (ranks 2, 3) is gone" in last, errors
        output, errors = processes["node-b"].communicate(timeout=120)
        assert processes["node-b"].returncode == 1, output + errors
        assert "node node-a (ranks 0, 1) is gone" in errors.strip().splitlines()[-2], errors


def test_both_nodes_restart_when_a_rank_of_either_is_killed(
    nodes: dict[str, str], tiny_options: list[str], tiny_config: Make, tmp_path: Path
) -> None:
    train(tiny_config(*ONE_PROCESS, "--training.steps=60", "--job.name=one-process"))
    words = [*tiny_options, *WORDS, "--training.steps=60", "--checkpoint.interval=2"]
    metrics = tmp_path / "runs" / "restarted" / "metrics.jsonl"
    killed: set[int] = set()
    with started(nodes, [*words, "--job.name=restarted"], MAX_RESTARTS="2") as processes:
        for count, space in zip((4, 24), nodes.values(), strict=True):
            wait_for_rows(metrics, count, processes)
            rank = ranks_in(space)[0]
            killed.add(rank)
            os.kill(rank, 9)
        for host, process in processes.items():
            output, errors = process.communicate(timeout=200)
            assert process.returncode == 0, f"{host}: {output}{errors}"
    assert len(killed) == 2
    assert_same_run(metrics.parent, tmp_path / "runs" / "one-process")


def test_a_lost_node_0_is_a_failure_of_the_run_and_no_mistake(
    nodes: dict[str, str], tiny_options: list[str], tmp_path: Path
) -> None:
    """Node 0 hosts the store, by which the other node would meet it again for the restart."""
    words = [*tiny_options, *WORDS, "--training.steps=100000", "--job.name=lost"]
    words += [f"--parallelism.timeout_seconds={SECONDS}"]
    with started(nodes, words, MAX_RESTARTS="1") as processes:
        wait_for_rows(tmp_path / "runs" / "lost" / "metrics.jsonl", 5, processes)
        found = subprocess.run(["ip", "netns", "pids", nodes["node-a"]], capture_output=True, text=True, check=True)
        for pid in map(int, found.stdout.split()):
            os.kill(pid, 9)
        output, errors = processes["node-b"].communicate(timeout=150)
        assert processes["node-b"].returncode == 1, output + errors
        assert "start the same command on each" not in errors


@pytest.mark.parametrize("host", ADDRESSES)
def test_a_node_that_never_comes(nodes: dict[str, str], tiny_options: list[str], host: str) -> None:
    process = start(host, nodes[host], [*tiny_options, *WORDS, "--job.name=alone"], RDZV_TIMEOUT="4")
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2, output + errors
    line = errors.strip().splitlines()
    assert len(line) == 1, errors
    assert "start the same command on each of the 2 nodes" in line[0]
