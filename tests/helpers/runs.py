"""Training runs in this process, and what they write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from titan_moe.checkpoint.prepared import prepare_run
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.tables import Config
from titan_moe.parallel.mesh import single
from titan_moe.runtime.log import start_log
from titan_moe.train.trainer import Trainer

TIMED = ("tokens_per_second", "step_seconds", "mfu", "memory_gib")
Make = Callable[..., Config]
"""The type of the fixture `tiny_config`: command-line options to a configuration."""
DEEPSEEK = ["--model.moe.shared_experts=1", "--balancer.rate=1e-2", "--model.moe.score=sigmoid"]
"""Options of a model with shared experts, sigmoid scores and a balancing bias, as DeepSeek-V3 has them."""


def train(config: Config) -> list[dict[str, Any]]:
    """Trains in this process and returns the rows of metrics.jsonl."""
    run_dir = RunDir(config)
    run_dir.open()
    start_log(run_dir.log, 0)
    try:
        Trainer(config, prepare_run(config, run_dir), run_dir, single(torch.device("cpu"))).run()
    finally:
        run_dir.close()
    return rows(run_dir)


def rows(run_dir: RunDir) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without timing and memory, which differ between two runs of the same job."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory, by name."""
    flat = checkpoint.parent / "flat.pt"
    dcp_to_torch_save(checkpoint, flat)
    loaded: dict[str, torch.Tensor] = torch.load(flat, weights_only=True)
    return loaded
