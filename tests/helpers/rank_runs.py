"""Training runs of several processes, started by run_train.sh, and the comparison of what two runs wrote."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import ROOT

# In float64 and at a constant rate, so that a run of fewer steps is the beginning of a longer one.
EXACT = ["--training.dtype=float64", "--lr_scheduler.decay=none", "--checkpoint.interval=0", "--validation.interval=3"]
TERMS = [f"--regularizers.{name}.weight=0.01" for name in ("z", "sp", "cp", "o", "v", "erc")]
COMPARED = ("loss", "ce", "grad_norm", "lr", "tokens", "perplexity", "bits_per_byte")


def run_train(processes: int, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `./run_train.sh` to its end with so many ranks on this machine, one thread each."""
    settings = {**os.environ, "NPROC": str(processes), "OMP_NUM_THREADS": "1", **environment}
    command = [str(ROOT / "run_train.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=240, check=False)


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of the run directory `run`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, wanted: Path) -> None:
    """Two run directories have the same rows, up to the order of float64 sums."""
    assert_same_rows(rows(run), rows(wanted))


def assert_same_rows(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Same steps, and losses, terms and routing measures equal up to the order of float64 sums."""
    assert [(row["kind"], row["step"]) for row in ours] == [(row["kind"], row["step"]) for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        for name, value in row.items():
            if name in COMPARED or name.startswith(("reg/", "moe/")):
                assert value == pytest.approx(other[name], rel=1e-9, abs=1e-12), (row["step"], name)
