"""What run_train.sh starts: ranks by visible GPUs, threads by CPUs, nodes by SLURM; and where its ranks listen."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from tests.helpers.commands import ROOT
from titan_moe.errors import UserError
from titan_moe.runtime import processes
from titan_moe.runtime.cpus import available_cpus
from titan_moe.runtime.scheduler import Task


@pytest.fixture
def settings(tmp_path: Path):
    """Runs the module as run_train.sh does, on a node with so many GPUs (a stand-in for nvidia-smi lists them)."""

    def run(gpus: int = 0, **environment: str) -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
        tool = tmp_path / "nvidia-smi"
        lines = "".join(f'echo "GPU {n}: A (UUID: GPU-{n})"\n' for n in range(gpus))
        tool.write_text(f"#!/bin/sh\n{lines}")
        tool.chmod(0o755)
        known = ("PATH", "HOME", "LD_LIBRARY_PATH")
        base = {name: os.environ[name] for name in known if name in os.environ} | {"PYTHONPATH": str(ROOT)}
        base["PATH"] = f"{tmp_path}:{base['PATH']}"
        command = [sys.executable, "-m", "titan_moe.runtime.processes"]
        done = subprocess.run(command, capture_output=True, text=True, env=base | environment, check=False)
        lines = done.stdout.replace("export ", "").splitlines()
        return dict(line.split("=", 1) for line in lines), done

    return run


@pytest.mark.parametrize(
    ("visible", "ranks"),
    [
        (None, 4), ("0,1", 2), ("3", 1), ("", 1), ("-1", 1), ("0,-1,1", 1), ("0,9,1", 1), (" 1 , 2 ", 2),
        ("GPU-0,GPU-1", 2), ("MIG-GPU-0/1/0", 1), ("none", 1),
    ],
)  # fmt: skip
def test_a_rank_for_every_visible_gpu(settings, visible: str | None, ranks: int) -> None:
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert settings(4, **chosen)[0]["NPROC"] == str(ranks)
    assert settings(4, **chosen, NPROC="3")[0]["NPROC"] == "3"


def test_cpus_are_shared_among_ranks_and_a_users_number_of_threads_stays(settings) -> None:
    cpus = available_cpus()
    assert settings(NPROC="2")[0]["OMP_NUM_THREADS"] == str(max(1, cpus // 2))
    assert settings(NPROC="2", OMP_NUM_THREADS="7")[0]["OMP_NUM_THREADS"] == "7"
    assert settings(NPROC=str(1000))[0]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NPROC": "x"}, "NPROC = 'x' is not a number"),
        ({"NPROC": "0"}, "NPROC = '0' is not a number, 1 or more"),
        ({"NPROC": "²"}, "NPROC = '²'"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS = '-1'"),
        ({"NUMA": "near"}, "NUMA = 'near' must be one of node, socket, exclusive, core-complex"),
        ({"NUMA": "node"}, "binds several ranks to the cores near their GPUs, and there is one"),
        ({"NUMA": "node", "NPROC": "2"}, "binds ranks to the cores near their GPUs, and there is no GPU"),
        ({"NNODES": "2"}, "NODE_RANK = '' must be this node's number, 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK = '2' must be"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "RDZV_ENDPOINT = '' must be host:port"),
        ({"NNODES": "2", "NODE_RANK": "0", "RDZV_ENDPOINT": "node0"}, "RDZV_ENDPOINT = 'node0' must be host:port"),
        (
            {"NNODES": "2", "NODE_RANK": "0", "RDZV_ENDPOINT": "no-such-host.invalid:2950"},
            "RDZV_ENDPOINT = 'no-such-host.invalid': this host name has no address",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(settings, environment: dict[str, str], message: str) -> None:
    _, done = settings(**environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_ranks_are_bound_near_their_gpus(settings, tmp_path: Path) -> None:
    """torchrun calls numactl; without it that is said before ranks start."""
    if shutil.which("numactl") is None:
        assert "needs the program numactl" in settings(2, NUMA="node")[1].stderr
    tool = tmp_path / "numactl"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert settings(2, NUMA="node")[0]["NUMA"] == "node"
    assert settings(2)[0]["NUMA"] == "''"
    parse_args(["--numa-binding", "node", "script"])  # torchrun has the option


def test_endpoints_as_people_write_them(settings) -> None:
    nodes = {"NNODES": "2", "NODE_RANK": "1"}
    assert settings(**nodes, RDZV_ENDPOINT=" http://127.0.0.1:2950/")[0]["RDZV_ENDPOINT"] == "127.0.0.1:2950"
    assert settings(**nodes, RDZV_ENDPOINT="[::1]:2950")[0]["RDZV_ENDPOINT"] == "'[::1]:2950'"


def slurm(task: int, tasks: int, nodes: int) -> dict[str, str]:
    per_node = tasks // nodes
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "1",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task % per_node),
        "SLURM_NODEID": str(task // per_node),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})",
        "SLURM_STEP_NODELIST": "localhost,other",
    }


def test_one_task_of_srun_per_node_starts_a_rank_per_gpu(settings) -> None:
    values, _ = settings(4, **slurm(1, 2, 2))
    names = ("NPROC", "NNODES", "NODE_RANK", "RDZV_ENDPOINT")
    assert [values[name] for name in names] == ["4", "2", "1", "localhost:15078"]
    values, _ = settings(0, **slurm(1, 2, 2), NPROC="3")
    assert (values["NPROC"], values["NNODES"]) == ("3", "2")


def test_a_task_of_srun_per_gpu_is_a_rank(settings) -> None:
    for environment in (slurm(1, 4, 2), slurm(1, 2, 1), {**slurm(1, 2, 2), "CUDA_VISIBLE_DEVICES": "0"}):
        values, _ = settings(4, **environment)
        assert (values["NPROC"], values["NNODES"]) == ("1", "1")
    _, done = settings(4, **slurm(1, 4, 2), NPROC="2")
    assert done.returncode == 2
    assert "SLURM has started 2 tasks on this node" in done.stderr


def test_variables_of_an_allocation_change_nothing(settings) -> None:
    allocation = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a[1-2]"}
    values, _ = settings(2, **allocation)
    assert (values["NPROC"], values["NNODES"]) == ("2", "1")
    values, _ = settings(2, **allocation, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", ENVIRONMENT="BATCH")
    assert (values["NPROC"], values["NNODES"]) == ("2", "1")


def test_several_tasks_on_a_node_do_not_start_ranks_of_their_own() -> None:
    task = Task("SLURM", 0, 4, 0, 4, 0, 1, "a", 15000)
    with pytest.raises(UserError, match="unset NPROC"):
        processes.check_one_rank(task, 2)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    own = [int(word) for word in found.split()]
    return [*own, *(grandchild for child in own for grandchild in children(child))]


def listening(pids: list[int]) -> dict[str, str]:
    """Addresses (hexadecimal, as Linux lists them) on which these processes listen, by inode."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9]: row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


LOOPBACK = ("0100007F", "00000000000000000000000001000000")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's list of sockets")
def test_all_processes_of_one_node_listen_on_loopback_only(tiny_options: list[str], tmp_path: Path) -> None:
    """The launcher's store, and the ranks' sockets for collectives."""
    words = [*tiny_options, "--training.steps=100000", "--metrics.tensorboard=false"]
    environment = {**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1"}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    process = subprocess.Popen(
        [str(ROOT / "run_train.sh"), *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "runs" / "debug" / "metrics.jsonl"
    try:
        end = time.monotonic() + 90
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.1)
        addresses = listening([process.pid, *children(process.pid)])
    finally:
        process.terminate()
        process.wait(60)
    assert len(addresses) >= 3  # the launcher's store and two ranks
    assert not {address for address in addresses.values() if address not in LOOPBACK}


def test_run_train_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "absolute").symlink_to(ROOT / "run_train.sh")
    (tmp_path / "folder" / "relative").symlink_to("../absolute")
    for link in ("absolute", "folder/relative"):
        environment = {**os.environ, "NPROC": "2"}
        done = subprocess.run(
            [str(tmp_path / link), "--help"], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("usage: titan-moe train") == 1


@pytest.mark.slow
def test_two_tasks_of_srun_start_two_ranks_each(tiny_options: list[str], tmp_path: Path) -> None:
    """One task per node, as in scripts/multinode.slurm; here both nodes are this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    words = [*tiny_options, "--training.steps=2", "--validation.interval=0", "--metrics.tensorboard=false"]
    assert subprocess.run([str(ROOT / "run_train.sh"), "--check", *words], check=False).returncode == 0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    variables = {**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1", "RDZV_ENDPOINT": endpoint}
    tasks = [
        subprocess.Popen([str(ROOT / "run_train.sh"), *words], env=variables | slurm(n, 2, 2), text=True, **pipes)
        for n in range(2)
    ]
    for task in tasks:
        _, errors = task.communicate(timeout=120)
        assert task.returncode == 0, errors
    assert (tmp_path / "runs" / "debug" / "logs" / "rank-3.log").exists()
