"""Shared pieces of the tests: small configurations, a small corpus, and running the command line for real."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from titan_moe.config.load import load_config
from titan_moe.config.tables import Config

ROOT = Path(__file__).resolve().parent.parent

THREADS = 2

TINY = [
    "--model.dim=32",
    "--model.layers=3",
    "--model.heads=2",
    "--model.moe.experts=8",
    "--model.moe.top_k=2",
    "--model.moe.hidden_dim=24",
    "--training.steps=6",
    "--training.batch_size=4",
    "--training.seq_len=32",
    "--lr_scheduler.warmup_steps=2",
    "--tokenizer.vocab_size=512",
    "--validation.sequences=4",
    "--validation.interval=3",
    "--checkpoint.interval=2",
    "--checkpoint.keep=100",
    "--metrics.interval=1",
    "--data.validation_fraction=0.05",
]


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of forty small text files: modules of the standard library."""
    import sysconfig

    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    for source in sources:
        (folder / source.name).write_bytes(source.read_bytes()[:12_000])
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_options(corpus_dir: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    """Options that make `debug` a job of seconds."""
    return [
        *TINY,
        f"--data.corpus={corpus_dir}",
        f"--data.cache_dir={cache_dir}",
        f"--job.output_dir={tmp_path / 'runs'}",
    ]


@pytest.fixture
def tiny_config(tiny_options: list[str]) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        return load_config("debug", [*tiny_options, *overrides])

    return make


def titan_moe(*arguments: str, timeout: float = 120, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Runs `titan-moe` as a user would, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS)}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "titan_moe.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
        **kwargs,
    )
