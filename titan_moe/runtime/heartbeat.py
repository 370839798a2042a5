"""Which ranks are alive: every rank counts up a key in the process group's store, so that the error after a failed
collective can name a lost node or rank."""

import contextlib
import faulthandler
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_moe.errors import LostRanksError
from titan_moe.runtime.files import open_append

INTERVAL = 2.0  # seconds between two heartbeats
WINDOW = 3 * INTERVAL  # a rank without a heartbeat for so many seconds is lost
STORE_SECONDS = 10.0  # a store that takes longer to respond is lost, too
GRACE_SECONDS = 30  # that a stuck rank lives on after the other ranks' collectives have timed out


class Heartbeat:
    """This rank's heartbeat, and a view of all other ranks'. Every rank of the process group must create one."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.hosts = [""] * self.ranks
        dist.all_gather_object(self.hosts, socket.gethostname())
        self.count = 0
        self.beat()
        dist.barrier()  # from here on every rank's key exists
        self.stopped = threading.Event()
        threading.Thread(target=self.keep_beating, daemon=True).start()

    def beat(self) -> None:
        self.count += 1
        self.store.set(f"alive/{self.rank}", str(self.count))

    def keep_beating(self) -> None:
        while not self.stopped.wait(INTERVAL):
            try:
                self.beat()
            except dist.DistError:
                return  # the store is gone, so nobody can read heartbeats any more

    def stop(self) -> None:
        self.stopped.set()

    def tell(self, error: Exception) -> None:
        """Tells the other ranks why this one fails, so that their errors name the cause."""
        with contextlib.suppress(dist.DistError):
            self.store.set(f"failed/{self.rank}", f"{type(error).__name__}: {str(error).strip()}".splitlines()[0])
            self.store.set("failed/any", "1")

    def explain(self, error: Exception) -> LostRanksError:
        """An error that names the ranks that failed or have no heartbeat. error: what the failed collective raised."""
        reason = re.sub(r"\[\S*gloo/\S*\] ", "", str(error).strip().splitlines()[0]).partition(". ")[0][:300]
        found: list[list[int]] = []
        told: list[str] = []

        def ask() -> None:
            with contextlib.suppress(dist.DistError):
                found.append(self.silent_ranks())
                told.extend(self.failures())
                self.wait_for_questions(found[0])

        # In a daemon thread, so that this process can exit: a store on a lost node may block for a quarter of an hour.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(STORE_SECONDS + WINDOW)
        if told:
            return LostRanksError(f"a collective failed because {told[0]}")
        if found:
            silent = found[0]
        elif self.hosts[0] == self.hosts[self.rank]:
            return LostRanksError(
                f"a collective failed, and rank 0, whose store says which ranks are alive, has ended; see its log ({reason})"
            )
        else:
            silent = [rank for rank in range(self.ranks) if self.hosts[rank] == self.hosts[0]]
        if silent:
            return LostRanksError(f"a collective failed: {self.in_words(silent)} gone ({reason})")
        return LostRanksError(
            f"a collective failed: all ranks are alive, and one of them is stuck; where, its log will say ({reason})"
        )

    def silent_ranks(self) -> list[int]:
        """Ranks without a heartbeat for `WINDOW` seconds, except those that exit because of a failed collective."""
        keys = [f"alive/{rank}" for rank in range(self.ranks)]
        before = self.store.multi_get(keys)
        time.sleep(WINDOW)
        after = self.store.multi_get(keys)
        silent = [rank for rank in range(self.ranks) if before[rank] == after[rank] and rank != self.rank]
        lost = [rank for rank in silent if not self.store.check([f"exiting/{rank}"])]
        self.store.set(f"exiting/{self.rank}", "1")
        return lost

    def failures(self, store: Any = None) -> list[str]:
        """What ranks have told about their failures. store: another connection to it."""
        store = store or self.store
        keys = [(rank, f"failed/{rank}") for rank in range(self.ranks)]
        return [f"rank {rank} failed: {store.get(key).decode()}" for rank, key in keys if store.check([key])]

    def wait_for_questions(self, silent: Iterable[int]) -> None:
        """On rank 0, which may host the store: waits until the other ranks have asked it too, or `WINDOW` seconds."""
        others = [f"exiting/{rank}" for rank in range(self.ranks) if rank not in silent]
        end = time.monotonic() + WINDOW
        while self.rank == 0 and time.monotonic() < end and not self.store.check(others):
            time.sleep(0.1)

    def in_words(self, ranks: Iterable[int]) -> str:
        """ "node b (ranks 2, 3) is" for all ranks of another node, "rank 3 on b is" for some of them."""
        lost = sorted(ranks)
        parts = []
        for host in dict.fromkeys(self.hosts[rank] for rank in lost):
            own = [rank for rank in lost if self.hosts[rank] == host]
            numbers = f"rank{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
            all_of_node = len(own) == self.hosts.count(host) and host != self.hosts[self.rank]
            parts.append(f"node {host} ({numbers})" if all_of_node else f"{numbers} on {host}")
        plural = len(parts) > 1 or (not parts[0].startswith("node") and len(lost) > 1)
        return f"{' and '.join(parts)} {'are' if plural else 'is'}"


def is_collective_failure(error: Exception) -> bool:
    """Whether a collective raised it: gloo raises plain RuntimeErrors that name its own source files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


class Watchdog:
    """Ends this process if `reset` is not called for some time, and before that writes all threads' stacks to a log."""

    def __init__(self, path: Path, seconds: int) -> None:
        """path: the log. seconds: after which a collective times out; the watchdog waits `GRACE_SECONDS` longer."""
        self.file = open_append(path)
        self.seconds = seconds + GRACE_SECONDS

    def reset(self) -> None:
        """Starts the time anew."""
        faulthandler.dump_traceback_later(self.seconds, file=self.file, exit=True)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.file.close()


@contextlib.contextmanager
def watched(
    log: Path,
    timeout_seconds: int,
    monitor: Callable[[Heartbeat], contextlib.AbstractContextManager[None]] | None = None,
) -> Iterator[Callable[[], None]]:
    """Watches over a rank of a distributed run; without a process group it does nothing.

    A collective that fails in the block raises LostRanksError, which names the ranks that are gone. A rank that makes no
    progress for `timeout_seconds` writes its stacks to `log` and exits. monitor: around the block, `monitor.monitored` on a
    GPU. Yields the function that reports progress.
    """
    if not dist.is_initialized():
        yield lambda: None
        return
    heartbeat, watchdog = Heartbeat(), Watchdog(log, timeout_seconds)
    try:
        with monitor(heartbeat) if monitor else contextlib.nullcontext():
            yield watchdog.reset
    except Exception as error:
        if is_collective_failure(error):
            raise heartbeat.explain(error) from error
        heartbeat.tell(error)
        raise
    finally:
        watchdog.stop()
        heartbeat.stop()
