"""Whole runs of run_train.sh, and how the metrics of two of them are compared."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

# float64 and a constant learning rate, so that the rows of a shorter run are the first rows of a longer one.
EXACT = ["--training.dtype=float64", "--lr_scheduler.decay=none", "--checkpoint.interval=0", "--validation.interval=3"]
TERMS = [f"--regularizers.{name}.weight=0.01" for name in ("z", "sp", "cp", "o", "v", "erc")]
COMPARED = ("loss", "ce", "grad_norm", "lr", "tokens", "perplexity", "bits_per_byte")


def run_train(processes: int, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs run_train.sh to its end with so many ranks on this machine."""
    settings = {**os.environ, "NPROC": str(processes), "OMP_NUM_THREADS": "1", **environment}
    command = [str(ROOT / "run_train.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=240, check=False)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, reference: Path) -> None:
    assert_same_rows(rows(run), rows(reference))


def assert_same_rows(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Same steps, and losses, terms and routing measures equal but for the order of float64 sums."""
    assert [(row["kind"], row["step"]) for row in ours] == [(row["kind"], row["step"]) for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        for name, value in row.items():
            if name in COMPARED or name.startswith(("reg/", "moe/")):
                assert value == pytest.approx(other[name], rel=1e-9, abs=1e-12), (row["step"], name)
