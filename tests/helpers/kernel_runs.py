"""Gradients of a tiny model on some ranks, computed through the Triton kernels in their interpreter.

TRITON_INTERPRET=1 TITAN_MOE_KERNELS=interpret python -m tests.helpers.kernel_runs RANKS RESULT OPTION ...
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.ranks import launch
from tests.helpers.steps import gradients
from torchtitan_ext.kernels import swiglu


def recorded_gradients(words: list[str], world: int) -> tuple[dict[str, Tensor], set[tuple[str, ...]]]:
    """Every parameter's gradient on one global batch, and the outputs that the forward kernel was asked for."""
    asked = set()
    forward = swiglu.forward

    def record(gate_up: Tensor, rows_TK: Tensor | None, out: dict[str, Tensor], *floor: Any, **gates: Any) -> None:
        asked.add(tuple(out))
        forward(gate_up, rows_TK, out, *floor, **gates)

    swiglu.forward = record
    return gradients(words, world), asked


if __name__ == "__main__":
    ranks, result, *options = sys.argv[1:]
    torch.save(launch(int(ranks), recorded_gradients, options, int(ranks)), Path(result))
