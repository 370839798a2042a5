"""Ends a rank on a GPU when another rank is lost. On a CPU a collective fails by itself as soon as that happens.

With NCCL the host does not wait in collectives: a kernel on the device does, and NCCL's own watchdog ends the process after
`parallelism.timeout_seconds`, from a C++ thread, without a word about which rank is lost. So a thread here reads all ranks'
heartbeats. Not TORCH_NCCL_BLOCKING_WAIT: with that the host would wait in every collective.
"""

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch.distributed as dist

from titan_moe.errors import LostRanksError
from titan_moe.runtime.heartbeat import STORE_SECONDS, Heartbeat
from titan_moe.runtime.launch import record_error
from titan_moe.runtime.log import log_file

T = TypeVar("T")
STORE_LOST = "rank 0, or the launcher, whose store says which ranks are alive, has ended; see its log"

SECONDS = 60.0
"""Without a heartbeat for so long a rank is lost. Long, since one call into a library may keep Python from beating."""


@contextmanager
def monitored(heartbeat: Heartbeat, seconds: float = SECONDS) -> Iterator[None]:
    """Ends this process with status 1 and one line when another rank has been silent for `seconds` during the block."""
    stopped = threading.Event()
    store = heartbeat.store.clone()  # the heartbeat's own connection must not wait for this thread's
    ended = f"ended/{heartbeat.rank}"
    keys = [f"alive/{rank}" for rank in range(heartbeat.ranks)]

    def ask() -> tuple[list[bytes], list[str]]:
        """Every rank's count of heartbeats, and what ranks have told about their failures."""
        beats = store.multi_get(keys)
        return beats, heartbeat.failures(store) if store.check(["failed/any"]) else []

    def not_ended(ranks: list[int]) -> list[int]:
        return [rank for rank in ranks if not store.check([f"ended/{rank}"])]

    def watch() -> None:
        beats: list[bytes] = []
        since = [time.monotonic()] * heartbeat.ranks
        # 512 ranks that each read 512 heartbeats: the more ranks, the more seldom.
        while not stopped.wait(max(seconds / 4, heartbeat.ranks / 20)):
            now, answer = time.monotonic(), within(seconds, ask)
            if stopped.is_set():
                return
            if answer is None:
                end(LostRanksError(STORE_LOST))
                return
            found, told = answer
            since = [before if beats and beats[r] == found[r] else now for r, before in enumerate(since)]
            beats = found
            silent = [rank for rank in range(heartbeat.ranks) if now - since[rank] >= seconds]
            lost = within(seconds, functools.partial(not_ended, silent)) or []
            if (told or lost) and not stopped.is_set():
                gone = f"{heartbeat.in_words(lost)} gone: no sign of life for {seconds:.0f} s" if lost else ""
                end(LostRanksError(told[0] if told else gone))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        within(STORE_SECONDS, lambda: store.set(ended, "1"))  # a rank may end before others


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What `ask()` returns; None when the store is gone, or takes longer: that of a lost node may block for minutes."""
    answers: list[T] = []

    def run() -> None:
        with suppress(dist.DistError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def end(error: LostRanksError) -> None:
    """Ends the process from any thread: the main thread waits for the device and can't be interrupted."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        record_error(error, 1)
    print(f"error: {error}", file=sys.stderr, flush=True)
    log_file.error(str(error))
    os._exit(1)
