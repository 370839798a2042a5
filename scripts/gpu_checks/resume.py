"""A training run that is killed and resumed: its rows must be those of a run that was left alone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_checks.report import ROOT, Report, python_path

TIMED = ("tokens_per_second", "step_seconds", "mfu", "memory_gib")
DETERMINISTIC = "--training.deterministic=true"
SMALL = ["--model.dim=64", "--model.layers=2", "--model.moe.experts=8", "--model.moe.hidden_dim=48"]


def options(report: Report, folder: Path, name: str, more: list[str]) -> list[str]:
    steps, interval = (6, 2) if report.toy else (200, 50)
    sizes = (
        [*SMALL, "--training.batch_size=2", "--training.seq_len=64"] if report.toy else ["--training.dtype=bfloat16"]
    )
    return [
        *sizes,
        f"--training.steps={steps}",
        f"--checkpoint.interval={interval}",
        f"--validation.interval={interval}",
        "--validation.sequences=4",
        f"--data.corpus={ROOT / 'docs'}",
        f"--data.cache_dir={folder / 'cache'}",
        "--tokenizer.vocab_size=512",
        "--metrics.tensorboard=false",
        "--compile.enable=false",  # three starts would compile three times
        f"--job.output_dir={folder}",
        f"--job.name={name}",
        *more,
    ]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": python_path(), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-m", "titan_moe.cli", "train", "--config", "debug", *words]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def finish(words: list[str], log: Path) -> None:
    if start(words, log).wait():
        raise RuntimeError(f"the run failed: {' '.join(log.read_text(errors='replace').splitlines()[-3:])}")


def rows(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of metrics.jsonl by kind and step, without timing and memory. Raises RuntimeError for a repeated one."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = {key: value for key, value in json.loads(line).items() if key not in TIMED}
        if (row["kind"], row["step"]) in found:
            raise RuntimeError(f"two rows of {row['kind']} step {row['step']}")
        found[row["kind"], row["step"]] = row
    return found


def kill_at(words: list[str], log: Path, checkpoint: Path) -> str:
    """Starts the run and kills it once the checkpoint is there. Says what was there then."""
    process = start(words, log)
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.002)
    if process.poll() is not None:
        raise RuntimeError(f"the run ended before it was killed: {log.read_text(errors='replace')[-300:]}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return f"killed after {checkpoint.name}"


def differing(found: dict[tuple[str, int], dict[str, Any]], wanted: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Every key of every row that is not the same, with both values."""
    return [
        f"{kind} {step}: {key} {wanted[kind, step].get(key)} became {found.get((kind, step), {}).get(key)}"
        for kind, step in wanted
        for key in wanted[kind, step]
        if found.get((kind, step), {}).get(key) != wanted[kind, step][key]
    ]


def attempt(report: Report, folder: Path, label: str, more: list[str]) -> None:
    log = folder / f"{label}.log"
    calm, killed = (options(report, folder, f"{label}-{name}", more) for name in ("calm", "killed"))
    began = time.monotonic()
    finish(calm, log)
    seconds = time.monotonic() - began
    step = 4 if report.toy else 100
    what = kill_at(killed, log, folder / f"{label}-killed" / "checkpoints" / f"step-{step:08d}")
    finish(killed, log)
    wanted, found = rows(folder / f"{label}-calm"), rows(folder / f"{label}-killed")
    problems = differing(found, wanted)
    report.row(
        label,
        f"{len(wanted)} in {seconds:.0f} s",
        what,
        len(found),
        report.same(len(problems), 0),
        "; ".join(problems[:2]),
    )


def stage(report: Report) -> None:
    report.line("The default model on the text of docs/, with deterministic operations; on a card in bfloat16.")
    report.table(
        "run", "rows undisturbed", "killed", "rows after the resumption", "values that differ", "the first two"
    )
    with tempfile.TemporaryDirectory() as name:
        with report.trial("deterministic"):
            attempt(report, Path(name), "deterministic", [DETERMINISTIC])
            return
        # An operation without a deterministic kernel: then the same without that demand, which may show rounding.
        with report.trial("not deterministic"):
            attempt(report, Path(name), "not-deterministic", [])
