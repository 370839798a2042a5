"""The environment variables by which the ranks of a run find each other: RANK, WORLD_SIZE, MASTER_ADDR and so on.

torchrun and run_train.sh set them. Where a scheduler has started the ranks, they are set here from its variables.
Does not import torch.
"""

import os
import re
import socket
import threading
import time

from titan_moe.errors import UserError
from titan_moe.runtime.cpus import affinity, limit_threads
from titan_moe.runtime.scheduler import number, task_of

LOOPBACK = "127.0.0.1"
RESOLVE_SECONDS = 5  # a new container's name may take some seconds to resolve


def check_ranks() -> None:
    """Checks the variables, or sets them from a scheduler's. One process needs none of them. Raises UserError."""
    if not os.environ.get("RANK") and os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
        _from_scheduler()
        return
    for name, other in (("WORLD_SIZE", "RANK"), ("RANK", "WORLD_SIZE")):
        if not os.environ.get(other):
            value = os.environ[name]
            raise UserError(
                f"environment: {name} = {value!r} without {other}; unset {name} to train with one process, or start "
                "several with NPROC=N ./run_train.sh, torchrun or srun, which set both"
            )
    ranks, rank = number(os.environ, "WORLD_SIZE", 1), number(os.environ, "RANK")
    if rank >= ranks:
        raise UserError(
            f"environment: RANK = {rank}, but WORLD_SIZE = {ranks}: ranks are numbered from 0 to {ranks - 1}"
        )
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if os.environ.get(name):
            number(os.environ, name)


def _from_scheduler() -> None:
    task = task_of()
    if task is None:
        return
    if task.rank >= task.ranks:
        raise UserError(f"environment: {task.scheduler} says that this is task {task.rank} of {task.ranks}")
    host = LOOPBACK if task.local_ranks == task.ranks else task.host
    if not host and not os.environ.get("MASTER_ADDR"):
        raise UserError(
            f"environment: {task.scheduler} has started {task.ranks} ranks on {task.nodes} nodes; set MASTER_ADDR, on all "
            "of them, to the host of rank 0"
        )
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(task.port))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = (task.rank, task.ranks, task.local_rank, task.local_ranks)
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
    if affinity() == os.cpu_count():  # else the scheduler has given every rank its own CPUs
        limit_threads(task.local_ranks)


def on_one_node() -> bool:
    """Whether all ranks are on this node, so that nothing outside it needs to reach them."""
    local, ranks = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    host, _ = split_address(os.environ.get("MASTER_ADDR", ""))
    return (local or "1") == (ranks or "1") or host.lower() in (LOOPBACK, "localhost", "::1")


def master_address() -> tuple[str, int]:
    """Host and port of rank 0, from MASTER_ADDR and MASTER_PORT, as people write them. Raises UserError."""
    host, _ = split_address(os.environ.get("MASTER_ADDR", ""))
    if not host:
        raise UserError("environment: MASTER_ADDR is not set; it must be the host of rank 0, the same on every rank")
    port = master_port()
    check_resolves(host, "environment: MASTER_ADDR")
    return host, port


def master_port() -> int:
    """The port of rank 0: MASTER_PORT, else the one in MASTER_ADDR. Raises UserError."""
    raw = os.environ.get("MASTER_PORT", "").strip() or split_address(os.environ.get("MASTER_ADDR", ""))[1]
    if not is_port(raw):
        raise UserError(f"environment: MASTER_PORT = {raw!r} must be a port on the host of rank 0, 1 to 65535")
    return int(raw)


def is_port(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,5}", text) is not None and 0 < int(text) < 1 << 16


def split_address(text: str) -> tuple[str, str]:
    """Host and port ("": none) of "node0", "node0:29500", " http://node0:29500/", "[fe80::1]:29500" or "fe80::1"."""
    rest = re.sub(r"^\w+://", "", text.strip()).rstrip("/")
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(\d*))?", rest)
    if bracketed:
        return bracketed.group(1), bracketed.group(2) or ""
    if rest.count(":") > 1:  # an IPv6 address
        return rest, ""
    host, _, port = rest.partition(":")
    return host.strip(), port.strip()


def check_resolves(host: str, name: str) -> None:
    """Raises UserError, within seconds, when a host name has no address. name: what the user has set to this host."""
    reasons: list[str] = []
    done = threading.Event()

    def resolve() -> None:
        end = time.monotonic() + RESOLVE_SECONDS
        while True:
            try:
                socket.getaddrinfo(host, None)
            except (OSError, UnicodeError) as error:
                reasons.append(str(getattr(error, "strerror", None) or error))
                if time.monotonic() < end:
                    time.sleep(1)
                    continue
            else:
                reasons.clear()
            done.set()
            return

    # In a daemon thread: a name server that does not respond may hold the call for a minute.
    threading.Thread(target=resolve, daemon=True).start()
    if not done.wait(RESOLVE_SECONDS + 2) or reasons:
        reason = reasons[-1] if reasons else f"no answer within {RESOLVE_SECONDS} s"
        raise UserError(
            f"{name} = {host!r}: this host name has no address ({reason}); set the host or address of rank 0"
        )
