"""Imported by the server that ranks are forked from: a training step of one process, so that ranks need not each import what
PyTorch imports at first use. It starts no thread, which a forked process would lack, and keeps nothing of the step."""

import os
from pathlib import Path

import torch

from tests.helpers.steps import DEEPSEEK, train


def threads() -> int:
    """How many this process has; those of imports (OpenBLAS) start again in a forked process."""
    tasks = Path("/proc/self/task")
    return len(os.listdir(tasks)) if tasks.exists() else 1


torch.set_num_threads(1)
before = threads()
train(DEEPSEEK, 1, 1)
assert threads() == before, "the first step started a thread"
