"""Starts `titan-moe sweep` as a process, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.commands import ROOT, TINY

SWEEP = """
config = "debug"
seeds = [0, 1]
validations = 2
inspect = true
keep = 2
[set]
validation.interval = 2
checkpoint.upcycle_path = "{dense}"
model.moe.normalize_topk = true
[before.dense]
model.moe.first_dense_layers = 3
model.moe.top_k = 1
regularizers = { lb.weight = 0.0, z.weight = 0.0, sp.weight = 0.0, cp.weight = 0.0 }
[arms.lb]
[arms."lb,sp"]
regularizers.sp.weight = 0.5
[grid]
style = { vanilla = {}, biased = { balancer.rate = 1e-2 } }
"""


def start_sweep(sweep_file: Path, folder: Path, corpus: Path, *words: str) -> subprocess.Popen[str]:
    tiny = [word for word in TINY if "top_k" not in word]  # the dense arm sets top_k; options would override it
    options = [*tiny, f"--data.corpus={corpus}", "--training.dtype=float32", "--model.moe.hidden_dim=24", *words]
    command = [sys.executable, "-m", "titan_moe.cli", "sweep", "--config", str(sweep_file), "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TITAN_MOE_CACHE": str(folder.parent / "cache")}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "--processes=2", *options], env=environment, stdout=pipe, stderr=pipe, text=True, cwd=folder.parent
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return out
