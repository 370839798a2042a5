"""A run whose training text is still being tokenised: starts the process that does it, and waits for what it has not written.

All ranks wait together, so that no rank is in a collective while another one waits: a collective has a time limit.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from titan_moe.data.loader import Windows
from titan_moe.data.stream_reader import StreamedWindows
from titan_moe.data.stream_writer import BackgroundWriter
from titan_moe.errors import TrainingError, UserError
from titan_moe.parallel.mesh import Mesh
from titan_moe.runtime.files import own_folder
from titan_moe.runtime.stopping import Stopping
from torchtitan_ext.collectives import all_sum

POLL_SECONDS = 0.2
MESSAGE_SECONDS = 60.0

log = logging.getLogger("titan_moe")


class TextOfRun:
    """The tokens of a run's training text, of which a stream's are written while the run goes on."""

    def __init__(self, windows: Windows, batch_size: int, mesh: Mesh, stopping: Stopping) -> None:
        self.stream = windows if isinstance(windows, StreamedWindows) else None
        self.batch_size, self.mesh, self.stopping = batch_size, mesh, stopping
        self.writer: BackgroundWriter | None = None
        self.known = 0
        """Tokens that all ranks have."""
        self.failed, self.error = False, ""

    @property
    def growing(self) -> bool:
        """Whether there are tokens of the text still to be written."""
        return self.stream is not None and not self.stream.stream.folder.ended

    @contextlib.contextmanager
    def written(self, steps: int, run: Path) -> Iterator[None]:
        """While the block runs, a process per node writes the tokens of `steps` steps, if any are missing."""
        if self.stream is None:
            yield
            return
        needed = self.stream.needed(steps - 1, self.batch_size)
        if int(os.environ.get("LOCAL_RANK") or "0") == 0 and not self.stream.stream.known(needed):
            path = own_folder(run, "logs") / f"tokenising-{self.mesh.rank}.log"
            self.writer = BackgroundWriter(self.stream.stream.folder, needed, path)
            self.writer.keep_going()
        try:
            yield
        finally:
            if self.writer is not None:
                self.writer.stop()

    def is_there(self, step: int, progress: Callable[[], None]) -> bool:
        """Waits until all ranks have the tokens of a step (counted from 1). A collective, but only where a step needs more
        than the one before. Returns False when a signal stops the run, or the tokens can't be written."""
        if self.stream is None:
            return True
        if self.writer is not None:
            self.writer.keep_going()
        needed = self.stream.needed(step - 1, self.batch_size)
        if needed <= self.known:
            return True
        said = -MESSAGE_SECONDS
        while True:
            there = self.stream.stream.known(needed)
            failed = not there and self.writer is not None and self.writer.error is not None
            waiting, failures = self.over_ranks(not there, failed)
            if not waiting:
                self.known = needed
                return True
            if failures:
                self.failed, self.error = True, (self.writer and self.writer.error) or ""
                return False
            if self.stopping.vote():
                return False
            if time.monotonic() - said >= MESSAGE_SECONDS:
                said = time.monotonic()
                log.info(
                    f"step {step}: waiting for its text: {len(self.stream.stream):,} of {needed:,} tokens are there"
                )
            progress()
            time.sleep(POLL_SECONDS)
            if self.writer is not None:
                self.writer.keep_going()

    def over_ranks(self, *flags: bool) -> list[bool]:
        """Whether any rank has each of the flags."""
        if self.mesh.everyone is None:
            return list(flags)
        return [
            count > 0
            for count in all_sum(torch.tensor(flags, device=self.mesh.device) * 1.0, self.mesh.everyone).tolist()
        ]

    def check(self) -> None:
        """Raises why the run was stopped, if the tokens of its next step could not be written."""
        if not self.failed:
            return
        if self.error:
            raise UserError(f"{self.error} (the run has saved its state; the same command goes on from there)")
        raise TrainingError("the text of the next step could not be written; the log of another rank says why")
