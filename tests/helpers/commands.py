"""The command line run as a user runs it: real processes, and the options of a training run that takes seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

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


def environment() -> dict[str, str]:
    """This process's environment, with the checkout on the import path and as many threads as the tests use."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS)}


def titan_moe(*arguments: str, timeout: float = 120, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Runs `titan-moe` in a process of its own and waits for its end, at most `timeout` seconds."""
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "titan_moe.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        check=False,
        **kwargs,
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts `titan-moe` in a process of its own and does not wait."""
    return subprocess.Popen(
        [sys.executable, "-m", "titan_moe.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Under nohup the tests themselves ignore SIGHUP, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def complaints(stderr: str) -> list[str]:
    """The lines on stderr, without those about the preparation of text (the first run with a new cache): that a tokenizer is
    being trained, and what was read."""
    return [line for line in stderr.splitlines() if not line.startswith(("Training a tokenizer", "Read ", "  "))]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Returns once metrics.jsonl of run directory `run` has a row of `step`. Fails after some seconds, or when `process`
    ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())
