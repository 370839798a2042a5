"""What a scheduler says about this process, when it has started several: SLURM's srun, Open MPI's or PMI's mpirun.

Does not import torch.
"""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from titan_moe.errors import UserError

LAST_STEP = 0xFFFFFFF0  # from here on SLURM's step numbers mean a batch script or an interactive shell


class Task(NamedTuple):
    """One of the processes that a scheduler has started."""

    scheduler: str
    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    """Processes on this node."""
    node: int
    nodes: int
    host: str
    """The first node, where rank 0 is; empty: the scheduler does not say."""
    port: int
    """A port that all processes of this job, and few other jobs, choose."""


def task_of(environ: Mapping[str, str] = os.environ) -> Task | None:
    """The task that this process is, of two or more; None: no scheduler started several. Raises UserError.

    A batch script, an interactive allocation and a shell in it also have a scheduler's variables, and are no tasks.
    """
    for read in (_slurm, _open_mpi, _pmi):
        task = read(environ)
        if task is not None:
            return task if task.ranks > 1 else None
    return None


def number(environ: Mapping[str, str], name: str, least: int = 0) -> int:
    """The number in an environment variable. Raises UserError, which names the variable, for anything else."""
    raw = environ.get(name, "").strip()
    if not re.fullmatch(r"[0-9]{1,9}", raw) or int(raw) < least:
        raise UserError(f"environment: {name} = {environ.get(name, '')!r} is not a number, {least} or more")
    return int(raw)


def _slurm(environ: Mapping[str, str]) -> Task | None:
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    if not all(environ.get(name) for name in needed):
        return None
    # srun sets a step number. Without one this is a batch script, or variables that are left of something else.
    left_over = not step and environ.get("ENVIRONMENT") == "BATCH"
    special = step.isdecimal() and int(step) >= LAST_STEP
    shell = "SLURM_PTY_PORT" in environ or environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if left_over or special or shell:
        return None
    # The variables with STEP are this srun's; those without may be the whole allocation's.
    count = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if environ.get(name)), None)
    names = next((environ[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if environ.get(name)), "")
    if count is None or not names:
        return None
    nodes = next((name for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if environ.get(name)), None)
    ranks, node = number(environ, count, 1), number(environ, "SLURM_NODEID")
    node_count = 1 if nodes is None else number(environ, nodes, 1)
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    counts = tasks_per_node(per_node)
    local_ranks = counts[node] if node < len(counts) and sum(counts) == ranks else -(-ranks // node_count)
    job = environ.get("SLURM_JOB_ID", environ.get("SLURM_JOBID", "0"))
    seed = (int(job) if job.isdecimal() else 0) + (int(step) if step.isdecimal() else 0)
    rank, local_rank = number(environ, "SLURM_PROCID"), number(environ, "SLURM_LOCALID")
    return Task(
        "SLURM", rank, ranks, local_rank, local_ranks, node, node_count, first_host(names), 15000 + seed % 10000
    )


def first_host(names: str) -> str:
    """The first host of SLURM's list: "gpu[03-05,9],login" to "gpu03"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", names.strip())
    assert first
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def tasks_per_node(counts: str) -> list[int]:
    """SLURM's count of tasks on each node: "2(x3),1" to [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _open_mpi(environ: Mapping[str, str]) -> Task | None:
    if not environ.get("OMPI_COMM_WORLD_SIZE"):
        return None
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    return _mpi("Open MPI", environ, "OMPI_COMM_WORLD_SIZE", names, "OMPI_COMM_WORLD_LOCAL_SIZE")


def _pmi(environ: Mapping[str, str]) -> Task | None:
    """MPICH's and Intel MPI's mpirun. SLURM can set PMI_RANK too, but not the variables of this node."""
    if not (environ.get("PMI_SIZE") and environ.get("MPI_LOCALNRANKS")):
        return None
    return _mpi("mpirun", environ, "PMI_SIZE", ("PMI_RANK", "MPI_LOCALRANKID"), "MPI_LOCALNRANKS")


def _mpi(scheduler: str, environ: Mapping[str, str], size: str, names: tuple[str, str], local_size: str) -> Task:
    rank, local_rank = (number(environ, name) for name in names)
    ranks, local_ranks = number(environ, size, 1), number(environ, local_size, 1)
    nodes = -(-ranks // local_ranks)
    return Task(scheduler, rank, ranks, local_rank, local_ranks, rank // local_ranks, nodes, "", 29500)
