"""Starts the processes of one node, as torchrun does, and says at the end which rank failed first and why.

    python -m titan_moe.runtime.launch [options of `titan-moe train`]

Reads NPROC, NNODES, NODE_RANK, RDZV_ENDPOINT, RDZV_TIMEOUT, MAX_RESTARTS and LOCAL_ADDR. run_train.sh calls it; torchrun does
as well (`torchrun --nproc-per-node 2 -m titan_moe.cli train ...`), with torchrun's own messages. Exit status: the first
failed process's, 128 + n when it died of signal n or this one was told to stop by it.
"""

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from titan_moe.errors import UserError

T = TypeVar("T")
QUIET = 2
READ_SECONDS = 20  # for one answer of the rendezvous, which may be on a lost node
ANSWER_SECONDS = 5
SAVE_SECONDS = 300  # for the last step and its checkpoint after a signal


def main() -> None:
    """Entry point."""
    # The agent's own account of a failure is forty lines; `first_failure` says it in one.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # After a restart the shared store still has the addresses of processes that are gone, and the new ones call those.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        status = launch(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.stderr.flush()
    os._exit(status)  # threads that still call a lost node would keep it


def launch(words: list[str]) -> int:
    """Starts this node's processes, waits for them, and returns the exit status. Raises UserError."""
    nodes, endpoint = number("NNODES", 1), os.environ.get("RDZV_ENDPOINT", "localhost:0")
    timeout = number("RDZV_TIMEOUT", 600)
    rendezvous: dict[str, Any] = {"join_timeout": timeout, "read_timeout": READ_SECONDS}
    # The first node keeps the rendezvous; without a number the endpoint's address says who that is.
    if "NODE_RANK" in os.environ:
        rendezvous["is_host"] = number("NODE_RANK", 0) == 0
        if not rendezvous["is_host"]:
            wait_for(endpoint, timeout)
    restarts = number("MAX_RESTARTS", 0)
    address = os.environ.get("LOCAL_ADDR")
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(signals())
    handler = None
    try:
        parameters = RendezvousParameters(
            "c10d", endpoint, "titan_moe", min_nodes=nodes, max_nodes=nodes, local_addr=address, **rendezvous
        )
        handler = Patience(get_rendezvous_handler(parameters), timeout)
        spec = WorkerSpec(
            role="trainer",
            local_world_size=number("NPROC", 1),
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=("-u", "-m", "titan_moe.cli", "train", *words),
            max_restarts=restarts,
            monitor_interval=0.1,
            local_addr=address,
        )
        agent = LocalElasticAgent(spec, logs_specs=DefaultLogsSpecs(), shutdown_timeout=SAVE_SECONDS)
        result = agent.run()
        return first_failure(result.failures) if result.is_failed() else 0
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousTimeoutError as error:
        raise UserError(
            f"NNODES: not all of {nodes} nodes came to {endpoint} within {timeout} s; start the same command on every node, "
            "NODE_RANK counting from 0, or raise RDZV_TIMEOUT"
        ) from error
    except RendezvousError as error:
        raise UserError(f"RDZV_ENDPOINT = {endpoint}: no rendezvous there: {error}") from error
    finally:
        if handler is not None:
            handler.shutdown()


class Patience(RendezvousHandler):
    """A rendezvous that answers in time, even when the node that keeps it is lost: torch's own waits without end."""

    def __init__(self, handler: RendezvousHandler, timeout: int) -> None:
        self.handler, self.timeout = handler, timeout
        self.unanswered: threading.Thread | None = None

    def ask(self, question: Callable[[], T], seconds: float, otherwise: T) -> T:
        """The answer, or `otherwise` when there is none in time, or an earlier question still waits for its own."""
        if self.unanswered is not None and self.unanswered.is_alive():
            return otherwise
        answers: list[T] = []
        failures: list[Exception] = []

        def work() -> None:
            try:
                answers.append(question())
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
        self.unanswered = thread if thread.is_alive() else None
        if failures:
            raise failures[0]
        return answers[0] if answers else otherwise

    def num_nodes_waiting(self) -> int:
        return self.ask(self.handler.num_nodes_waiting, ANSWER_SECONDS, 0)

    def next_rendezvous(self) -> RendezvousInfo:
        found = self.ask(self.handler.next_rendezvous, self.timeout + ANSWER_SECONDS, None)
        if found is None:
            raise RendezvousTimeoutError
        return found

    def shutdown(self) -> bool:
        return self.ask(self.handler.shutdown, ANSWER_SECONDS, False)

    @property
    def use_agent_store(self) -> bool:
        return self.handler.use_agent_store

    def get_backend(self) -> str:
        return self.handler.get_backend()

    def get_run_id(self) -> str:
        return self.handler.get_run_id()

    def is_closed(self) -> bool:
        return self.handler.is_closed()

    def set_closed(self) -> None:
        self.handler.set_closed()


def wait_for(endpoint: str, seconds: int) -> None:
    """Returns when something listens there. Raises UserError after so many seconds, or for what is no address."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"RDZV_ENDPOINT = {endpoint!r} must be host:port, the same on every node")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or error
                raise UserError(
                    f"RDZV_ENDPOINT = {endpoint}: the first node did not answer within {seconds} s ({reason}); start the same"
                    " command with NODE_RANK=0 there, or raise RDZV_TIMEOUT"
                ) from error
            time.sleep(1)
        else:
            return


def signals() -> list[str]:
    """What is handed on to the processes, which then save and end; not what `nohup` has turned off."""
    names = ["SIGTERM", "SIGINT", "SIGUSR1"]
    return names if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*names, "SIGHUP"]


def number(name: str, default: int) -> int:
    """A natural number from the environment. Raises UserError."""
    value = os.environ.get(name) or str(default)
    if not value.isdigit():
        raise UserError(f"{name} = {value!r} is not a number")
    return int(value)


def first_failure(failures: dict[int, ProcessFailure]) -> int:
    """Says which rank of this node failed first and why; returns its exit status."""
    rank, failure = min(failures.items(), key=lambda item: when(item[1]))
    found = recorded(failure)
    # Who wrote its error was leaving; that the signal which ends the others met it on the way out says nothing.
    code = int(found.get("status", failure.exitcode))
    status = code if code > 0 else 128 - code
    if code - 128 in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        return status  # it was told to stop, has saved, and has said so
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"failed, status {status}"
    reason = found.get("message", "")
    print(
        f"error: first to fail on {socket.gethostname()}: rank {rank} {how}{f': {reason}' if reason else ''}",
        file=sys.stderr,
    )
    print(f"  more in the run directory's logs/rank-{rank}.log", file=sys.stderr)
    return status


def recorded(failure: ProcessFailure) -> dict[str, Any]:
    """What the process wrote about its error (parallel/lifesigns.py), if it could."""
    data: Any = failure.error_file_data
    message = data.get("message") if isinstance(data, dict) else None
    return message if isinstance(message, dict) else {}


def when(failure: ProcessFailure) -> tuple[bool, float]:
    """Causes before consequences, then by time. What was killed could write nothing; what left with status 2 and wrote nothing
    left since another one had said why."""
    found = recorded(failure)
    if not found:
        return failure.exitcode == QUIET, 0.0 if failure.exitcode < 0 else math.inf
    return bool(found.get("consequence")), float(found.get("time", 0.0))


if __name__ == "__main__":
    main()
