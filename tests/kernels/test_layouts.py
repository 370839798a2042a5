"""Runs in processes of their own, with the switches that docs/kernels.md names: layouts, and the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import ROOT, environment
from tests.helpers.interpreter import INTERPRETED
from tests.helpers.layouts import LAYOUTS, SEQUENCE
from tests.helpers.steps import gradients

SWITCHES = {"TRITON_INTERPRET": "1", "TITAN_MOE_KERNELS": "interpret"}
# What the forward kernel computes: tensor-parallel ranks sum Gram matrices, expert-parallel ones send activations home.
ASKED = {
    "alone": ("z", "values", "overlaps", "slopes", "scales"),
    "tp2": ("z", "gram"),
    "ep2": ("z",),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="runs on CPU tensors, in the interpreter"),
]


def run(*command: str, **switches: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=240, cwd=ROOT,
        env=environment() | switches, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layout", ASKED)
def test_gradients_on_every_layout_equal_those_of_one_process_in_float64(layout: str, tmp_path: Path) -> None:
    world, degrees = LAYOUTS.get(layout, (1, []))
    result = tmp_path / "result"
    run(
        "tests.helpers.kernel_runs",
        str(world),
        str(result),
        "--training.dtype=float32",
        *SEQUENCE,
        *degrees,
        **SWITCHES,
    )
    wanted = gradients(SEQUENCE, 1)
    for found, asked in torch.load(result, weights_only=False):
        assert asked == {ASKED[layout]}
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name].double() - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_command_line_trains_through_the_kernels(tiny_options: list[str], tmp_path: Path) -> None:
    """Two float32 steps with and without kernels: the same up to the order of sums."""
    small = ["--training.steps=2", "--training.batch_size=2", "--training.seq_len=16", "--model.layers=2"]
    small += ["--validation.sequences=2", "--validation.interval=2"]
    runs = []
    for name, switches in (("kernels", SWITCHES), ("none", {"TITAN_MOE_KERNELS": "0"})):
        options = [*small, "--training.dtype=float32", "--regularizers.sp.weight=0.01"]
        run("titan_moe.cli", "train", *tiny_options, *options, f"--job.output_dir={tmp_path / name}", **switches)
        (metrics,) = (tmp_path / name).glob("**/metrics.jsonl")
        runs.append([json.loads(line) for line in metrics.read_text().splitlines()])
    assert [row["kind"] for row in runs[0]] == [row["kind"] for row in runs[1]]
    for row, other in zip(*runs, strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-4, abs=1e-6)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in row if key in ("loss", "ce", "grad_norm") or key.startswith("reg/")}
