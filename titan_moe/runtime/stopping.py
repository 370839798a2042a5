"""Signals that stop a run: the current step ends, all ranks agree to stop, and the run saves a checkpoint."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from types import FrameType

import torch
from torch import Tensor

from torchtitan_ext.collectives import Group, all_sum

log = logging.getLogger("titan_moe")

# SIGUSR1 is a scheduler's warning.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopping:
    """Whether a run is to stop. One process asks itself; several sum votes, so that all stop after the same step."""

    def __init__(self, everyone: Group | None, device: torch.device) -> None:
        """everyone: the group of all ranks; None for one process. device: where the votes are summed."""
        self.everyone, self.device = everyone, device
        self.signal: int | None = None
        """The signal that this process received; once the ranks have agreed, the one that they stop for."""
        self.agreed = False
        self.no_votes = torch.zeros(len(STOPPING), device=device)

    @property
    def stop(self) -> bool:
        """Whether to stop after this step; the same on all ranks."""
        return self.agreed or (self.everyone is None and self.signal is not None)

    def votes(self) -> Tensor:
        """(4,), 1 for the signal that this process has received. Their sum over all ranks goes to `count`."""
        if self.signal is None:
            return self.no_votes
        return torch.tensor([float(self.signal == number) for number in STOPPING], device=self.device)

    def count(self, votes: Sequence[float]) -> None:
        """Takes the votes of all ranks. A signal that arrived after the vote counts in the next one."""
        elected = next((number for number, count in zip(STOPPING, votes, strict=True) if count), None)
        if elected is not None:
            self.signal, self.agreed = elected, True

    def vote(self) -> bool:
        """Whether to stop, by a vote between steps. Collective."""
        if self.everyone is not None:
            self.count(all_sum(self.votes(), self.everyone).tolist())
        return self.stop

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT, SIGUSR1 and SIGHUP let the step finish and save; a second SIGINT exits at once."""

        def remember(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's signature
            if self.signal is not None and number == signal.SIGINT:
                os._exit(130)
            self.signal = number
            log.info(f"{signal.Signals(number).name}: finishing this step, then saving")

        previous = {
            number: signal.signal(number, remember)
            for number in STOPPING
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # `nohup` ignores it
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
