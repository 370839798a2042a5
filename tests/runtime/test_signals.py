"""SIGTERM in every phase of a run: it saves, ends soon, and continues bitwise like an undisturbed run."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import TINY, start, titan_moe
from tests.helpers.runs import train, untimed
from titan_moe.config.tables import Config
from titan_moe.runtime.stopping import Stopping
from titan_moe.train import trainer
from titan_moe.train.trainer import Trainer

WORDS = ["--training.steps=120", "--checkpoint.interval=5", "--validation.interval=8", "--validation.sequences=40"]


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def has_row(run: Path, kind: str, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and any((row["kind"], row["step"]) == (kind, step) for row in rows(run))


PHASES: dict[str, Callable[[Path], bool]] = {
    "step": lambda run: has_row(run, "train", 5),
    "save": lambda run: any((run / "checkpoints").glob(".step-*")),
    "validation": lambda run: has_row(run, "train", 8),
    "first-validation": lambda run: (run / "config.toml").exists(),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run without signals."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = [f"--data.corpus={corpus_dir}", f"--data.cache_dir={cache_dir}", f"--job.output_dir={folder}"]
    done = titan_moe("train", *TINY, *data, *WORDS)
    assert done.returncode == 0, done.stderr
    return untimed(rows(folder / "debug"))


@pytest.mark.parametrize(
    ("phase", "background"),
    [(phase, "false") for phase in PHASES] + [("save", "true"), ("validation", "true")],
)
@pytest.mark.slow
def test_a_run_continues_after_sigterm_in(
    phase: str, background: str, undisturbed: list[dict[str, Any]], tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, *WORDS, f"--checkpoint.async_save={background}"]
    run = tmp_path / "runs" / "cut"
    process = start("train", *words, "--job.name=cut")
    deadline = time.monotonic() + 60
    while not PHASES[phase](run):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 30
    assert process.returncode == 143, errors
    assert not list((run / "checkpoints").glob(".*"))
    again = titan_moe("train", *words, "--job.name=cut")
    assert again.returncode == 0, again.stderr
    assert untimed(rows(run)) == undisturbed


@pytest.mark.parametrize("signals", [(0,), (0, 0), (3,), (3, 3)], ids=str)
def test_sigterm_during_a_validation_loses_no_row(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, signals: tuple[int, ...]
) -> None:
    """signals: for each run in turn, the step of the validation during which it gets SIGTERM."""
    options = ["--validation.sequences=8", "--training.deterministic=true", "--checkpoint.interval=2"]
    expected = untimed(train(tiny_config("--job.name=undisturbed", *options)))
    waiting = list(signals)
    at: list[int] = []  # the step of the running validation
    validate_at, validate = Trainer.validate, trainer.validate

    def remember_step(self: Trainer, step: int, *others: Any, **named: Any) -> bool:
        at[:] = [step]
        return validate_at(self, step, *others, **named)

    def with_signal(*others: Any) -> Any:
        if at == waiting[:1]:
            signal.raise_signal(signal.SIGTERM)
            waiting.pop(0)
        return validate(*others)

    monkeypatch.setattr(Trainer, "validate", remember_step)
    monkeypatch.setattr(trainer, "validate", with_signal)
    for _ in signals:
        before = untimed(train(tiny_config("--job.name=cut", *options)))
        assert len(before) < len(expected)
    assert not waiting
    assert untimed(train(tiny_config("--job.name=cut", *options))) == expected


def test_a_signal_after_the_vote_counts_in_the_next() -> None:
    stopping = Stopping(None, torch.device("cpu"))
    with stopping.signals():
        votes = stopping.votes().clone()
        signal.raise_signal(signal.SIGUSR1)
        stopping.count(votes.tolist())
        assert not stopping.agreed
        stopping.count(stopping.votes().tolist())
    assert stopping.agreed
    assert stopping.signal == signal.SIGUSR1


def test_one_process_stops_without_a_vote() -> None:
    stopping = Stopping(None, torch.device("cpu"))
    with stopping.signals():
        assert not stopping.stop
        signal.raise_signal(signal.SIGTERM)
        assert stopping.stop


def test_sigterm_during_data_preparation(tiny_options: list[str], tmp_path: Path) -> None:
    words = [
        *tiny_options,
        f"--data.cache_dir={tmp_path / 'fresh'}",
        "--data.corpus=stdlib",
        "--tokenizer.vocab_size=4000",
    ]
    process = start("train", *words)
    assert process.stderr is not None
    assert "Training a tokenizer" in process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - sent < 30
    assert process.returncode == 143
    assert not list((tmp_path / "fresh").glob("tokens/*/manifest.json"))
    again = titan_moe("train", *tiny_options, f"--data.cache_dir={tmp_path / 'fresh'}", "--training.steps=2")
    assert again.returncode == 0, again.stderr
