"""Generation on several ranks: rank 0 reads prompts and writes texts, and all ranks compute the same new tokens."""

import datetime
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from titan_moe.config.degrees import resolve
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.parallel.mesh import Mesh, limit_waiting, start_processes
from titan_moe.parallel.replicated import without_fsdp

WAITING = datetime.timedelta(days=1)  # for a prompt, in an interactive session


def inference_mesh(config: Config, world: int, device: torch.device) -> Mesh:
    """Starts the process group, if there are several ranks. Raises UserError unless all of them are tp or ep ranks."""
    degrees = resolve(config.parallelism, world, str)
    if degrees.world != degrees.tp * degrees.ep:
        raise UserError(
            f"parallelism: generate spreads a model over tp * ep ranks, and there are {world}; give --parallelism.tp, "
            "--parallelism.ep, or both"
        )
    start_processes(device, config.parallelism.timeout_seconds)
    mesh = without_fsdp(Mesh(degrees, device))
    if world > 1:
        limit_waiting(config.parallelism.timeout_seconds)
    return mesh


class SameOnAllRanks:
    """Sends what rank 0 has read or chosen to all ranks. With one rank it does nothing."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=WAITING) if dist.is_initialized() else None

    def tokens(self, chosen: list[int]) -> list[int]:
        """Rank 0's choice of tokens. Ranks' logits are equal, but a rank that rounded otherwise would wait for ever."""
        if self.group is None:
            return chosen
        ids = torch.tensor(chosen, dtype=torch.int64)
        dist.broadcast(ids, 0, group=self.group)
        return ids.tolist()

    def prompts(self, prompts: Sequence[str] | None) -> list[str] | None:
        """Rank 0's prompts; None: there are no more."""
        sent = [None if prompts is None else list(prompts)]
        if self.group is not None:
            dist.broadcast_object_list(sent, 0, group=self.group)
        return sent[0]


def leave(status: int) -> NoReturn:
    """Ends a rank at once. An orderly end would wait for ranks that are in the middle of a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
