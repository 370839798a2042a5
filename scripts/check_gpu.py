"""Is this GPU right and fast? Runs the checks below and writes what they find as Markdown tables.

    python scripts/check_gpu.py                                 everything, in about ten minutes
    python scripts/check_gpu.py --budget 300 --stages terms,step
    python scripts/check_gpu.py --toy                           the same checks on a CPU, at toy sizes; times mean nothing

Every stage runs in a process of its own with its part of the budget; one that fails or takes too long does not end the
others. Lines are printed and appended to the file as they come, so a run that is cut off leaves what it had.

Exit status: 0 all stages ran and all that must be equal is; 1 something that must be equal is not; 3 nothing of that
kind, but a stage failed or ran out of time; 2 a wrong option.
"""

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from gpu_checks.goals import rows  # noqa: E402
from gpu_checks.report import DIFFERENT, FAILED, Report, python_path, read_facts  # noqa: E402
from gpu_checks.stages import STAGES  # noqa: E402

LEAST = 30.0
"""Seconds without which a stage is not started: importing PyTorch takes some of them."""


class Output:
    """Prints lines and appends them to the file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()


def run_stage(name: str, toy: bool, seconds: float, facts: Path, output: Output) -> str:
    """Runs a stage in a process of its own, at most this long. Returns "done", "DIFFERENT", "failed" or "stopped"."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    if toy:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "check_gpu.py"), "--stage", name]
    command += ["--seconds", str(seconds), "--facts", str(facts), *(["--toy"] if toy else [])]
    stopped = threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        # A session of its own, so that what the stage starts ends with it.
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )

        def stop() -> None:
            stopped.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                output.line(line.rstrip("\n"))
            status = process.wait()
        finally:
            timer.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if stopped.is_set():
            output.line(f"\n**Stopped after its {seconds:.0f} s.**")
            return "stopped"
        if status in (0, DIFFERENT, FAILED):
            return {0: "done", DIFFERENT: "DIFFERENT", FAILED: "failed"}[status]
        errors.seek(0)
        output.line(f"\n**Failed with status {status}:**\n\n```")
        for line in errors.read().splitlines()[-12:]:
            output.line(line[:300])
        output.line("```")
        return "failed"


def run_all(names: list[str], toy: bool, budget: float, output: Output) -> int:
    """Runs the stages, then prints the summary. Returns the exit status."""
    began = time.monotonic()
    outcomes: dict[str, tuple[str, float]] = {}
    output.line(f"# check_gpu.py, {datetime.datetime.now():%Y-%m-%d %H:%M}{', toy sizes on a CPU' if toy else ''}")
    with tempfile.TemporaryDirectory() as folder:
        facts = Path(folder) / "facts"
        for number, name in enumerate(names):
            left = budget - (time.monotonic() - began)
            share = left * STAGES[name].weight / sum(STAGES[later].weight for later in names[number:])
            seconds = min(left, max(share, LEAST))
            output.line(f"\n## {STAGES[name].title} (`{name}`, at most {seconds:.0f} s)")
            start = time.monotonic()
            if seconds < min(LEAST, 10):
                output.line("No time left.")
                outcomes[name] = "stopped", 0.0
                continue
            outcome = run_stage(name, toy, seconds, facts, output)
            outcomes[name] = outcome, time.monotonic() - start
        found = read_facts(facts)
    output.line("\n## Summary\n")
    output.line("| stage | outcome | seconds |\n| --- | --- | --- |")
    for name, (outcome, taken) in outcomes.items():
        output.line(f"| {name} | {outcome} | {taken:.0f} |")
    card = found.get("card", "")
    output.line(f"\n| goal | wanted | measured{f' on {card}' if card else ''} | reached |\n| --- | --- | --- | --- |")
    for row in rows(found, card):
        output.line(f"| {' | '.join(row)} |")
    results = {outcome for outcome, _ in outcomes.values()}
    return 1 if "DIFFERENT" in results else 3 if results - {"done"} else 0


def child(arguments: argparse.Namespace) -> int:
    """One stage, in this process."""
    report = Report(arguments.toy, arguments.seconds, arguments.facts)
    if report.on_card:
        import torch

        torch.cuda.set_device(report.device)
        report.fact("card", torch.cuda.get_device_name(report.device))
    STAGES[arguments.stage].run(report)
    return report.status


def stage_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"no stage {name!r}; there are {', '.join(STAGES)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="for all stages together (600, with --toy 1200)"
    )
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU even if there is a card")
    parser.add_argument("--stages", type=stage_names, default=list(STAGES), help=f"some of {','.join(STAGES)}")
    parser.add_argument("--output", type=Path, default=Path("check_gpu.md"), help="file to append to (check_gpu.md)")
    for name, kind in {"--stage": str, "--seconds": float, "--facts": Path}.items():
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # how this script starts itself for a stage
    arguments = parser.parse_args()
    if arguments.stage:
        return child(arguments)
    if not arguments.toy:
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch sees no GPU; --toy runs the checks on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with arguments.output.open("a") as file:
        budget = arguments.budget or (1200 if arguments.toy else 600)
        return run_all(arguments.stages, arguments.toy, budget, Output(file))


if __name__ == "__main__":
    sys.exit(main())
