"""torch.compile of every transformer block: one graph for all equal blocks, and what that took.

Blocks are compiled one by one, so that FSDP can gather the next block's weights while one computes. Equal blocks share
their graphs: the number of a layer is an input of the graph, not a constant in it.
"""

import logging
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import calculate_time_spent

from titan_moe.config.tables import Compile

log = logging.getLogger("titan_moe")

GRAPHS = 64
"""Versions of a block that are compiled at most; by default Dynamo runs a block eagerly after 8. A run needs up to nine: dense,
first MoE and other MoE layers, each in training with and without terms that don't depend on tokens, and in validation."""


def compiles(settings: Compile, device: torch.device) -> bool:
    """Whether blocks are compiled on this device: as set, and with "auto" on a GPU."""
    return device.type == "cuda" if settings.enable == "auto" else settings.enable


def compile_blocks(blocks: list[Any]) -> None:
    """Lets every block be compiled when it is first called. Call it after `recompute`, which belongs inside the graph."""
    dynamo: Any = torch._dynamo.config
    dynamo.allow_unspec_int_on_nn_module = True  # a layer's number as an input of the graph
    dynamo.recompile_limit = max(GRAPHS, dynamo.recompile_limit)
    for block in blocks:
        nn.Module.compile(block)


class CompileTime:
    """Reports in the log how long compilation took, once it has happened."""

    def __init__(self) -> None:
        self.reported = self.spent()

    def spent(self) -> float:
        """Seconds that Dynamo and its back end have taken in this process."""
        return float(calculate_time_spent()["total_wall_time"])

    def report(self) -> None:
        """To be called after steps; logs what was compiled since the last call."""
        spent = self.spent()
        if spent > self.reported:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            log.info(f"torch.compile took {spent - self.reported:.1f} s; {graphs} graphs so far")
            self.reported = spent
