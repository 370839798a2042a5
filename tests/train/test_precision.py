"""bfloat16 and float8 beside float32: 50 steps of the default job, inside the band that docs/parallelism.md states."""

import functools
import json
import statistics
import subprocess
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, complaints

BAND, MEAN_BAND = 0.04, 0.005  # relative difference of the loss: at any step, and on average


@functools.cache
def losses(folder: Path, *words: str) -> list[float]:
    name = "-".join(word.rpartition("=")[2] for word in words)
    command = [
        str(ROOT / "run_train.sh"),
        *words,
        "--training.steps=50",
        f"--job.output_dir={folder}",
        f"--job.name={name}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not complaints(done.stderr)
    rows = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["--training.dtype=bfloat16"], ["--training.dtype=bfloat16", "--float8.enable=true"]],
    ids=["bfloat16", "float8"],
)
def test_within_the_band_of_float32(words: list[str], folder: Path) -> None:
    exact, found = losses(folder, "--training.dtype=float32"), losses(folder, *words)
    assert len(exact) == len(found) == 50
    differences = [abs(a - b) / b for a, b in zip(found, exact, strict=True)]
    assert 0 < max(differences) < BAND
    assert statistics.mean(differences) < MEAN_BAND
