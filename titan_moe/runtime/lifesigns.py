"""Who is still there: every rank leaves signs of life in the rendezvous store, so that the loss of a node has a name."""

import contextlib
import faulthandler
import json
import os
import re
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import torch.distributed as dist

from titan_moe.errors import LostRanksError

T = TypeVar("T")
INTERVAL = 2.0  # seconds between two signs of life
WINDOW = 3 * INTERVAL  # a rank without one for so long is gone
STORE_SECONDS = 10.0  # a store that takes longer to answer is gone, too
GRACE_SECONDS = 30  # that a stuck rank stays after the others have given up


class LifeSigns:
    """Of all ranks of the process group, on every one of them."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        names: list[tuple[str, str]] = [("", "")] * self.ranks
        dist.all_gather_object(names, (socket.gethostname(), uuid.uuid4().hex))
        self.hosts = [host for host, _ in names]
        self.start = names[0][1]
        """Part of every key: a store may outlive the processes, and hold what those before a restart left there."""
        self.count = 0
        self.beat()
        dist.barrier()  # from here on every key exists
        self.ended = threading.Event()
        threading.Thread(target=self.keep_beating, daemon=True).start()

    def beat(self) -> None:
        self.count += 1
        self.store.set(f"{self.start}/alive/{self.rank}", str(self.count))

    def keep_beating(self) -> None:
        while not self.ended.wait(INTERVAL):
            try:
                self.beat()
            except dist.DistError:
                return  # the store is gone, and with it whoever would have read this

    def stop(self) -> None:
        self.ended.set()

    def explain(self, error: Exception) -> LostRanksError:
        """What became of the other ranks, after a collective failed with this error."""
        last = re.sub(r"\[\S*gloo/\S*\] ", "", str(error).strip().splitlines()[0]).partition(". ")[0][:300]
        answer = within(STORE_SECONDS + WINDOW, self.silent_ranks)
        if answer is None:
            # Its store went with it, or the way there.
            whole = self.in_words(rank for rank in range(self.ranks) if self.hosts[rank] == self.hosts[0])
            what = f"{whole if self.hosts[0] != self.hosts[self.rank] else self.in_words([0])} gone"
        elif answer:
            what = f"{self.in_words(answer)} gone"
        else:
            what = "all ranks are alive, and one of them is stuck; where, its log will say"
        return LostRanksError(f"a collective failed: {what} ({last})")

    def silent_ranks(self) -> list[int]:
        """Ranks without a sign of life for `WINDOW` seconds, but for those that left after a failed collective themselves."""
        keys = [f"{self.start}/alive/{rank}" for rank in range(self.ranks)]
        before = self.store.multi_get(keys)
        time.sleep(WINDOW)
        after = self.store.multi_get(keys)
        silent = [rank for rank in range(self.ranks) if before[rank] == after[rank] and rank != self.rank]
        found = [rank for rank in silent if not self.store.check([f"{self.start}/left/{rank}"])]
        self.store.set(f"{self.start}/left/{self.rank}", "1")
        return found

    def in_words(self, ranks: Iterable[int]) -> str:
        """ "node b (ranks 2, 3) is" for a whole node, "rank 3 on b is" for one of several."""
        lost = sorted(ranks)
        parts = []
        for host in dict.fromkeys(self.hosts[rank] for rank in lost):
            own = [rank for rank in lost if self.hosts[rank] == host]
            numbers = f"rank{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
            whole = len(own) == self.hosts.count(host) and host != self.hosts[self.rank]
            parts.append(f"node {host} ({numbers})" if whole else f"{numbers} on {host}")
        plural = len(parts) > 1 or (not parts[0].startswith("node") and len(lost) > 1)
        return f"{' and '.join(parts)} {'are' if plural else 'is'}"


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """`ask()`, or None when the store fails or takes longer."""
    answers: list[T] = []

    def work() -> None:
        try:
            answers.append(ask())
        except dist.DistError:
            return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def is_collective_failure(error: Exception) -> bool:
    """Whether a collective failed, and not this rank: gloo raises plain RuntimeErrors that name its own source files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


class Alarm:
    """Ends a process that is stuck, and writes all its threads' stacks into its log before."""

    def __init__(self, path: Path, seconds: int) -> None:
        self.file: IO[str] = path.open("a")
        self.seconds = seconds + GRACE_SECONDS

    def set(self) -> None:
        """Starts the time anew."""
        faulthandler.dump_traceback_later(self.seconds, file=self.file, exit=True)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.file.close()


@contextlib.contextmanager
def watched(log: Path, timeout_seconds: int) -> Iterator[Callable[[], None]]:
    """Watches over a rank of a distributed run; without a process group it does nothing.

    A collective that fails in the block raises LostRanksError, which names the ranks that are gone. A rank that makes no
    progress for `timeout_seconds` writes its stacks to `log` and exits. Yields the function that reports progress.
    """
    if not dist.is_initialized():
        yield lambda: None
        return
    signs, alarm = LifeSigns(), Alarm(log, timeout_seconds)
    try:
        yield alarm.set
    except Exception as error:
        if is_collective_failure(error):
            raise signs.explain(error) from error
        raise
    finally:
        alarm.stop()
        signs.stop()


def record_failure(error: BaseException, status: int) -> None:
    """Writes the error to the file that torchrun names in TORCHELASTIC_ERROR_FILE; `titan_moe.runtime.launch` reads it.

    status: the exit status this process is about to leave with; a signal may reach it before it has left."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    now = time.time()
    details = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(now))}
    message = {
        "message": str(error) or type(error).__name__,
        "extraInfo": details,
        "time": now,
        "status": status,
        "consequence": isinstance(error, LostRanksError),
    }
    part = Path(f"{path}.part")
    part.write_text(json.dumps({"message": message}))
    part.replace(path)  # whole or not at all: the reader may have sent the signal that ends the writer
