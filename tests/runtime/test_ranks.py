"""The variables by which ranks find each other: torchrun's, a scheduler's, and mistakes in them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, environment, titan_moe
from titan_moe.errors import UserError
from titan_moe.runtime.ranks import check_ranks, master_address, on_one_node, split_address
from titan_moe.runtime.scheduler import first_host, task_of, tasks_per_node

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}
SHELLS = {
    "a batch script": {"ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "", "SLURM_PROCID": "0"},
    "an interactive step": {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},
    "srun --pty bash": {"SLURM_PTY_PORT": "4000", "SLURM_PROCID": "0"},
    "a shell of salloc": {"SLURM_PROCID": "", "SLURM_LOCALID": "", "SLURM_NODEID": ""},
    "a step of one task": {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    "a task's number alone": {"SLURM_LOCALID": "", "SLURM_NTASKS": "", "SLURM_STEP_NUM_TASKS": ""},
}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets these variables, and removes those of a scheduler or launcher that the tests themselves run under."""

    def set_variables(**values: str) -> None:
        for name in list(os.environ):
            if name in RANK_VARIABLES or name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_")):
                monkeypatch.delenv(name)
        for name in (*RANK_VARIABLES, "OMP_NUM_THREADS"):  # so that what the code sets ends with the test
            monkeypatch.setenv(name, values.get(name, ""))
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("node0", "node0", ""),
        ("node0:29500", "node0", "29500"),
        (" http://node0:29500/ ", "node0", "29500"),
        ("tcp://10.0.0.1:4", "10.0.0.1", "4"),
        ("[fe80::1]:29500", "fe80::1", "29500"),
        ("[fe80::1]", "fe80::1", ""),
        ("fe80::1", "fe80::1", ""),
        ("", "", ""),
    ],
)
def test_addresses_as_people_write_them(text: str, host: str, port: str) -> None:
    assert split_address(text) == (host, port)


def test_the_address_of_rank_0(variables: Callable[..., None]) -> None:
    variables(MASTER_ADDR=" http://127.0.0.1:4001/ ")
    assert master_address() == ("127.0.0.1", 4001)
    variables(MASTER_ADDR="[::1]:4001", MASTER_PORT="4002")
    assert master_address() == ("::1", 4002)


@pytest.mark.parametrize("port", ["", "x", "0", "65536", "²", "-1"])
def test_a_port_that_is_none(variables: Callable[..., None], port: str) -> None:
    variables(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(UserError, match=r"MASTER_PORT = '.*' must be a port"):
        master_address()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = '2' without RANK"),
        ({"RANK": "1"}, "RANK = '1' without WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2, but WORLD_SIZE = 2: ranks are numbered from 0 to 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK = 'x' is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = '-1' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "²"}, "WORLD_SIZE = '²' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE = '0' is not a number, 1 or more"),
        ({"RANK": "0", "WORLD_SIZE": "1" * 5000}, "WORLD_SIZE = '1+' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "one"}, "LOCAL_RANK = 'one' is not a number"),
        ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID = 'x' is not a number"),
        ({**SRUN, "SLURM_PROCID": "4"}, "task 4 of 4"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
            | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            "set MASTER_ADDR",
        ),
    ],
)
def test_variables_that_do_not_fit(variables: Callable[..., None], values: dict[str, str], message: str) -> None:
    variables(**values)
    with pytest.raises(UserError, match=message) as caught:
        check_ranks()
    assert "\n" not in str(caught.value)


def test_no_variables_are_one_process(variables: Callable[..., None]) -> None:
    for values in ({}, {"WORLD_SIZE": "1"}):
        variables(**values)
        check_ranks()
        assert not os.environ["RANK"]


def test_a_task_of_srun_is_a_rank(variables: Callable[..., None]) -> None:
    variables(**SRUN)
    check_ranks()
    assert [os.environ[name] for name in RANK_VARIABLES[:4]] == ["3", "4", "1", "2"]
    assert not on_one_node()


def test_variables_of_a_user_win_over_a_schedulers(variables: Callable[..., None]) -> None:
    variables(**SRUN, RANK="0", WORLD_SIZE="2")
    check_ranks()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "2")


@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_of_slurm_is_no_task(name: str) -> None:
    assert task_of(SRUN | SHELLS[name]) is None


def test_tasks_of_schedulers() -> None:
    task = task_of(SRUN)
    assert task is not None
    assert (task.host, task.port, task.node, task.nodes, task.local_ranks) == ("gpu07", 16234, 1, 2, 2)
    uneven = task_of(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"})
    assert uneven is not None
    assert uneven.local_ranks == 1
    pmi = task_of({"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"})
    assert pmi is not None
    assert (pmi.rank, pmi.ranks, pmi.local_rank, pmi.node, pmi.nodes) == (5, 8, 1, 1, 2)


def test_lists_of_slurm() -> None:
    assert [first_host(names) for names in ("a", "a,b", "gpu[03-05,9],login", "r[1-2]n[08-09]", "n[7]")] == [
        "a",
        "a",
        "gpu03",
        "r1n08",
        "n7",
    ]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def tasks(count: int) -> list[dict[str, str]]:
    """The environments of so many tasks of srun on this node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": str(count)}
    node |= {
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_JOB_NODELIST": "a-name-without-address",
        "MASTER_PORT": str(port),
    }
    numbers = ({"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(count))
    return [environment() | SRUN | node | number for number in numbers]


def train_as_tasks(words: list[str]) -> list[tuple[int, str]]:
    """Exit status and stderr of two tasks of srun that train."""
    command = [sys.executable, "-m", "titan_moe.cli", "train", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=task, text=True, **pipes) for task in tasks(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


@pytest.mark.slow
def test_two_tasks_of_srun_train_one_run(tiny_options: list[str], tmp_path: Path) -> None:
    words = [*tiny_options, "--training.steps=2", "--validation.interval=0", "--metrics.tensorboard=false"]
    assert [status for status, _ in train_as_tasks(words)] == [0, 0]
    assert (tmp_path / "runs" / "debug" / "logs" / "rank-1.log").exists()


@pytest.mark.slow
def test_without_a_launcher_the_other_ranks_name_the_one_that_failed(tiny_options: list[str], tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        """
import os
from titan_moe.extend import Term, register

@register
class Fails(Term):
    name = "fails"

    def value(self, view):
        if os.environ.get("RANK") == "1":
            raise ValueError("my mistake")
        return view.scores_TE.sum() * 0.0
"""
    )
    words = [f"--extensions.modules={tmp_path / 'fails.py'}", "--regularizers.fails.weight=1.0"]
    (status, errors), (other, _) = train_as_tasks([*tiny_options, *words, "--metrics.tensorboard=false"])
    assert (status, other) == (1, 1)
    assert errors.splitlines()[-1] == "error: a collective failed because rank 1 failed: ValueError: my mistake"


@pytest.mark.slow
def test_a_host_of_rank_0_without_an_address_is_named_within_seconds(tiny_options: list[str]) -> None:
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "titan_moe.cli", "train", *tiny_options],
        env=environment() | values,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert time.monotonic() - began < 60
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "MASTER_ADDR = 'no-such-host.invalid': this host name has no address" in line


def test_a_port_in_use_is_named(tiny_options: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        done = subprocess.run(
            [sys.executable, "-m", "titan_moe.cli", "train", *tiny_options],
            env=environment() | values,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert "another program on this host uses the port" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("values", [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "²"}], ids=str)
def test_a_part_of_the_variables_is_one_line_and_status_2(
    tiny_options: list[str], monkeypatch: pytest.MonkeyPatch, values: dict[str, str]
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    done = titan_moe("train", *tiny_options, cwd=ROOT)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
