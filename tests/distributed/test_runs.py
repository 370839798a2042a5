"""Whole runs under torchrun: they are what one process makes of them, and go on from one layout to another."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

# In float64 and at a constant rate, so that a run of fewer steps is the beginning of a longer one.
EXACT = ["--training.dtype=float64", "--lr_scheduler.decay=none", "--checkpoint.interval=0", "--validation.interval=3"]
TERMS = [f"--regularizers.{name}.weight=0.01" for name in ("z", "sp", "cp", "o", "v", "erc")]
SAME = ("loss", "ce", "grad_norm", "lr", "tokens", "perplexity", "bits_per_byte")


def run_train(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NPROC": str(processes), "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "run_train.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found: Path, wanted: Path) -> None:
    ours, theirs = rows(found), rows(wanted)
    assert [(row["kind"], row["step"]) for row in ours] == [(row["kind"], row["step"]) for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        for name, value in row.items():
            if name in SAME or name.startswith(("reg/", "moe/")):
                assert value == pytest.approx(other[name], rel=1e-9, abs=1e-12), (row["step"], name)


@pytest.mark.slow
def test_from_layout_to_layout(tiny_options: list[str], tmp_path: Path) -> None:
    untied = "--model.tie_embeddings=false"
    words = [*tiny_options, *EXACT, *TERMS, "--regularizers.lb.scope=sequence", untied]
    whole = run_train(1, *words, "--training.steps=15", "--job.name=whole")
    assert whole.returncode == 0, whole.stderr
    stages = [
        (1, 3, []),
        (2, 6, ["--parallelism.ep=2"]),
        (4, 9, ["--parallelism.tp=2", "--parallelism.cp=2"]),
        (2, 12, ["--training.microbatch_size=1", "--parallelism.pp=2"]),
        (2, 15, ["--training.microbatch_size=1", "--parallelism.dp_replicate=2"]),
    ]
    for processes, steps, layout in stages:
        part = run_train(processes, *words, *layout, f"--training.steps={steps}", "--job.name=parts")
        assert part.returncode == 0, part.stderr
        assert part.stdout.count(f"step {steps}/{steps}") == 1  # one rank speaks
    runs = tmp_path / "runs"
    assert_same_run(runs / "parts", runs / "whole")
    assert sorted(path.name for path in (runs / "parts" / "logs").iterdir()) == [f"rank-{n}.log" for n in range(4)]
    again = run_train(2, *words, "--training.steps=15", "--job.name=parts")
    assert again.returncode == 0
    assert "is finished: 15 steps" in again.stdout


def test_mistakes_are_found_before_processes_start(tiny_options: list[str]) -> None:
    done = run_train(3, *tiny_options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    done = run_train(2, *tiny_options, "--parallelism.tp=2", "--model.vocab_size=513", "--tokenizer.vocab_size=512")
    assert done.returncode == 2
    assert "parallelism.tp = 2 must divide model.vocab_size = 513" in done.stderr
