"""Signals that stop a run: the step under way ends, all ranks agree, and the run saves."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from types import FrameType

import torch

from torchtitan_ext.collectives import Group, all_sum

log = logging.getLogger("titan_moe")

# SIGUSR1 is a scheduler's warning.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopping:
    """Whether a run is to stop."""

    def __init__(self, everyone: Group | None, device: torch.device) -> None:
        """everyone: the group of all ranks; None for one process. device: where the group's collectives run."""
        self.everyone, self.device = everyone, device
        self.signal: int | None = None
        """A signal to this process, until all ranks have agreed to stop; then the one that they stop for."""

    def agreed(self) -> bool:
        """Whether any rank got a signal by now; the same answer on all, and the same signal."""
        seen = torch.tensor([float(self.signal == number) for number in STOPPING], device=self.device)
        counts = all_sum(seen, self.everyone).tolist()
        agreed = next((number for number, count in zip(STOPPING, counts, strict=True) if count), None)
        if agreed is None:
            return False  # and a signal that came meanwhile stays for the next time
        self.signal = agreed
        return True

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT, SIGUSR1 and SIGHUP let the step finish and save; a second SIGINT leaves at once."""

        def remember(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's signature
            if self.signal is not None and number == signal.SIGINT:
                os._exit(130)
            self.signal = number
            log.info(f"{signal.Signals(number).name}: finishing this step, then saving")

        previous = {
            number: signal.signal(number, remember)
            for number in STOPPING
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # what `nohup` does
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
