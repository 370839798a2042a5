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
    assert_same_rows(rows(found), rows(wanted))


def assert_same_rows(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [(row["kind"], row["step"]) for row in ours] == [(row["kind"], row["step"]) for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        for name, value in row.items():
            if name in SAME or name.startswith(("reg/", "moe/")):
                assert value == pytest.approx(other[name], rel=1e-9, abs=1e-12), (row["step"], name)


@pytest.mark.slow
def test_from_few_ranks_to_many_and_back(tiny_options: list[str], tmp_path: Path) -> None:
    """1, 2, 4 and 1 ranks, dp, ep, tp, cp, pp, saving in the background: the same tokens, the same numbers."""
    words = [*tiny_options, *EXACT, *TERMS, "--regularizers.lb.scope=sequence", "--model.tie_embeddings=false"]
    words += ["--checkpoint.async_save=true", "--checkpoint.interval=5"]
    whole = run_train(1, *words, "--training.steps=40", "--job.name=whole")
    assert whole.returncode == 0, whole.stderr
    stages = [
        (1, 6, []),
        (2, 12, []),
        (2, 18, ["--parallelism.ep=2"]),
        (4, 24, ["--parallelism.tp=2", "--parallelism.cp=2"]),
        (2, 30, ["--training.microbatch_size=1", "--parallelism.pp=2"]),
        (2, 36, ["--training.microbatch_size=1", "--parallelism.dp_replicate=2"]),
        (1, 40, []),
    ]
    for processes, steps, layout in stages:
        part = run_train(processes, *words, *layout, f"--training.steps={steps}", "--job.name=parts")
        assert part.returncode == 0, part.stderr
        assert part.stdout.count(f"step {steps}/{steps}") == 1  # one rank speaks
    runs = tmp_path / "runs"
    ends = {steps for _, steps, _ in stages}  # where a part of the run validated that the whole did not
    found, wanted = (
        [row for row in rows(runs / name) if row["kind"] == "train" or row["step"] not in ends]
        for name in ("parts", "whole")
    )
    assert_same_rows(found, wanted)
    assert [row.get("data_crc") for row in found] == [row.get("data_crc") for row in wanted]
    assert sorted(path.name for path in (runs / "parts" / "logs").iterdir()) == [f"rank-{n}.log" for n in range(4)]
    again = run_train(2, *words, "--training.steps=40", "--job.name=parts")
    assert again.returncode == 0
    assert "is finished: 40 steps" in again.stdout


def test_mistakes_are_found_before_processes_start(tiny_options: list[str]) -> None:
    done = run_train(3, *tiny_options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    done = run_train(2, *tiny_options, "--parallelism.tp=2", "--model.vocab_size=513", "--tokenizer.vocab_size=512")
    assert done.returncode == 2
    assert "parallelism.tp = 2 must divide model.vocab_size = 513" in done.stderr
