"""Ends a rank on a GPU when another rank is lost. On a CPU a collective fails by itself as soon as that happens.

With NCCL the host does not wait in collectives: a kernel on the device does, and NCCL's own watchdog ends the process after
`parallelism.timeout_seconds`, from a C++ thread, without a word about which rank is lost. So a thread here reads all ranks'
heartbeats. Not TORCH_NCCL_BLOCKING_WAIT: with that the host would wait in every collective.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from titan_moe.errors import LostRanksError
from titan_moe.runtime.heartbeat import Heartbeat
from titan_moe.runtime.launch import record_error
from titan_moe.runtime.log import log_file

SECONDS = 60.0
"""Without a heartbeat for so long a rank is lost. Long, since one call into a library may keep Python from beating."""


@contextmanager
def monitored(heartbeat: Heartbeat, seconds: float = SECONDS) -> Iterator[None]:
    """Ends this process with status 1 and one line when another rank has been silent for `seconds` during the block."""
    stopped = threading.Event()
    store = heartbeat.store.clone()  # the heartbeat's own connection must not wait for this thread's
    ended = f"ended/{heartbeat.rank}"

    def watch() -> None:
        # 512 ranks that each read 512 heartbeats: the more ranks, the more seldom.
        pause = max(seconds / 4, heartbeat.ranks / 20)
        keys = [f"alive/{rank}" for rank in range(heartbeat.ranks)]
        beats: list[bytes] = []
        since = [time.monotonic()] * heartbeat.ranks
        while not stopped.wait(pause):
            try:
                now, found = time.monotonic(), store.multi_get(keys)
                since = [before if beats and beats[rank] == found[rank] else now for rank, before in enumerate(since)]
                beats = found
                told = heartbeat.failures(store) if store.check(["failed/any"]) else []
                silent = [rank for rank in range(heartbeat.ranks) if now - since[rank] >= seconds]
                lost = [rank for rank in silent if not store.check([f"ended/{rank}"])]
            except dist.DistError:
                if not stopped.is_set():
                    end(
                        LostRanksError(
                            "rank 0, or the launcher, whose store says which ranks are alive, has ended; see its log"
                        )
                    )
                return
            if told and not stopped.is_set():
                end(LostRanksError(told[0]))
            if lost and not stopped.is_set():
                end(LostRanksError(f"{heartbeat.in_words(lost)} gone: no sign of life for {seconds:.0f} s"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        with suppress(dist.DistError):
            store.set(ended, "1")  # a rank may end before others


def end(error: LostRanksError) -> None:
    """Ends the process from any thread: the main thread waits for the device and can't be interrupted."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        record_error(error, 1)
    print(f"error: {error}", file=sys.stderr, flush=True)
    log_file.error(str(error))
    os._exit(1)
