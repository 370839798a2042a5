"""Shared fixtures of the tests of other people's files."""

from pathlib import Path

import pytest

from tests.helpers.commands import TINY
from tests.helpers.runs import train
from tests.helpers.strangers import copied_run
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import load_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("made")
    words = [*TINY, f"--data.corpus={corpus_dir}", f"--data.cache_dir={cache_dir}", f"--job.output_dir={folder}"]
    config = load_config("debug", [*words, "--training.steps=4", "--metrics.tensorboard=false"])
    train(config)
    return RunDir(config).path


@pytest.fixture
def stranger(run: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, with the cache that has its text."""
    monkeypatch.setenv("TITAN_MOE_CACHE", str(cache_dir))
    return copied_run(run, tmp_path)
