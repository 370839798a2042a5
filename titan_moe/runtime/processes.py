"""Says how many ranks run_train.sh starts on this node, as assignments that the shell reads. Does not import torch.

    eval "$(python -m titan_moe.runtime.processes)"     sets NPROC NNODES NODE_RANK RDZV_ENDPOINT NUMA OMP_NUM_THREADS

NPROC is what the user has set, else the number of visible GPUs, else 1. Under SLURM or mpirun the nodes come from its
variables when it has started one task per node.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

from titan_moe.errors import UserError
from titan_moe.runtime.cpus import available_cpus, limit_threads
from titan_moe.runtime.ranks import check_resolves, is_port, split_address
from titan_moe.runtime.scheduler import Task, number, task_of

DEFAULTS = {"NPROC": 0, "NNODES": 1, "NODE_RANK": 0, "RDZV_TIMEOUT": 600, "MAX_RESTARTS": 0}
NUMA_MODES = ("node", "socket", "exclusive", "core-complex")
"""What torchrun's --numa-binding takes."""
LEAST = {"NPROC": 1, "NNODES": 1, "RDZV_TIMEOUT": 1}


def main() -> None:
    """Prints the assignments. Exit status 2, and one line on stderr, for the user's mistake."""
    try:
        assignments = settings()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for name, value in assignments.items():
        print(f"export {name}={shlex.quote(value)}")


def settings() -> dict[str, str]:
    """The environment variables that run_train.sh sets. Raises UserError."""
    given = {name: number(os.environ, name, LEAST.get(name, 0)) for name in DEFAULTS if os.environ.get(name)}
    values = {**DEFAULTS, **given}
    endpoint = os.environ.get("RDZV_ENDPOINT", "")
    started = None if os.environ.get("RANK") or "NNODES" in given else task_of()
    if started is not None and started.local_ranks == 1 and values["NPROC"] != 1:
        values["NPROC"] = values["NPROC"] or visible_gpus() or 1
        if values["NPROC"] > 1:
            values |= {"NNODES": started.nodes, "NODE_RANK": started.node}
            endpoint = endpoint or (f"{started.host}:{started.port}" if started.host else "")
    elif started is not None:
        check_one_rank(started, values["NPROC"])
        values["NPROC"] = 1  # this process is one of the ranks
    elif os.environ.get("RANK") and os.environ.get("WORLD_SIZE") and "NPROC" not in given:
        values["NPROC"] = 1  # as above, started by torchrun or a container service
    values["NPROC"] = values["NPROC"] or visible_gpus() or 1
    if values["NNODES"] > 1:
        if values["NODE_RANK"] >= values["NNODES"] or ("NODE_RANK" not in given and started is None):
            shown = os.environ.get("NODE_RANK", "")
            raise UserError(f"NODE_RANK = {shown!r} must be this node's number, 0 to {values['NNODES'] - 1}")
        endpoint = checked_endpoint(endpoint)
    if values["NPROC"] > 1:
        limit_threads(values["NPROC"])
    numa = checked_numa(os.environ.get("NUMA", ""), values["NPROC"] * values["NNODES"])
    assignments = {name: str(value) for name, value in values.items()} | {"RDZV_ENDPOINT": endpoint, "NUMA": numa}
    if os.environ.get("OMP_NUM_THREADS"):
        assignments["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    elif values["NPROC"] * values["NNODES"] > 1:  # else torchrun would set 1
        assignments["OMP_NUM_THREADS"] = str(available_cpus())
    return assignments


def check_one_rank(task: Task, processes: int) -> None:
    """Raises UserError when each of several tasks on a node is asked to start several ranks."""
    if processes > 1:
        raise UserError(
            f"NPROC = {processes}, but {task.scheduler} has started {task.local_ranks} tasks on this node, each of which "
            "would start as many ranks; unset NPROC (a task is a rank), or start one task per node"
        )


def checked_endpoint(text: str) -> str:
    """RDZV_ENDPOINT as host:port. Raises UserError when it is none, or when the host has no address."""
    host, port = split_address(text)
    if not host or not is_port(port):
        raise UserError(f"RDZV_ENDPOINT = {text!r} must be host:port of node 0, the same on every node")
    check_resolves(host, "RDZV_ENDPOINT")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def checked_numa(mode: str, ranks: int) -> str:
    """NUMA: how ranks are bound to the CPU cores near their GPUs; empty: not. Raises UserError when they cannot be bound."""
    if not mode:
        return ""
    if mode not in NUMA_MODES:
        raise UserError(f"NUMA = {mode!r} must be one of {', '.join(NUMA_MODES)}")
    if ranks == 1:
        raise UserError(f"NUMA = {mode!r} binds several ranks to the cores near their GPUs, and there is one; unset it")
    if visible_gpus() == 0:
        raise UserError(f"NUMA = {mode!r} binds ranks to the cores near their GPUs, and there is no GPU; unset it")
    if shutil.which("numactl") is None:
        raise UserError(f"NUMA = {mode!r} needs the program numactl, which is not on PATH; install it, or unset NUMA")
    return mode


def visible_gpus() -> int:
    """The GPUs that CUDA_VISIBLE_DEVICES lets this process use: all without it, none when it is empty."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    count = len(re.findall(r"^GPU", listed, re.MULTILINE))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or count == 0:
        return count
    chosen = 0
    for device in (word.strip() for word in visible.split(",")):
        # As CUDA reads it: what follows an unknown device does not count. A name is the start of a GPU's or MIG's UUID.
        known = int(device) < count if re.fullmatch(r"[0-9]{1,9}", device) else device[:4] in ("GPU-", "MIG-")
        if not known:
            break
        chosen += 1
    return chosen


if __name__ == "__main__":
    main()
