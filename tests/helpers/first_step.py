"""Imported by the server that ranks are forked from: a training step of one process, so that ranks need not each import what
PyTorch imports at first use. It starts no thread, which a forked process would lack, and keeps nothing of the step."""

import os
from pathlib import Path

import torch

from tests.helpers.steps import DEEPSEEK, train

torch.set_num_threads(1)
train(DEEPSEEK, 1, 1)
assert not Path("/proc/self/task").exists() or len(os.listdir("/proc/self/task")) == 1, (
    "the first step started a thread"
)
