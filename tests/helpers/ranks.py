"""Real process groups on this machine: gloo over a file, one thread per rank, a hard time limit, nothing left behind.

Ranks are forked from a server that has imported PyTorch and trained for a step. Cases that need no processes of their own
share theirs: see `SharedRanks`."""

import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

# Imported once by the server that ranks are forked from, so that a rank starts in a tenth of a second.
PRELOAD = [
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "titan_moe.train.trainer",
    "torch._dynamo",
    "tests.helpers.first_step",
]
NEEDS_NEWER = "install torch 2.13 or newer"
"""What the trainer says of a layout that torch 2.11 does not support; such cases are skipped."""
Cases = Mapping[str, tuple[Any, ...]]
"""Name of a case -> a function and its arguments."""


class Failure(NamedTuple):
    case: str
    message: str


class SharedRanks:
    """Runs the function of every case on `world` ranks, one case after another in the same processes.

    The ranks start when the first case is asked for. A case that fails or exceeds its seconds ends them; ranks started anew
    run the cases after it, so every case has a result or a failure of its own. group: with a process group of all ranks."""

    def __init__(self, world: int, cases: Cases, seconds: float = 240.0, group: bool = True) -> None:
        self.world, self.seconds, self.group = world, seconds, group
        self.waiting = dict(cases)
        self.results: dict[str, list[Any]] = {}
        self.failures: dict[str, str] = {}

    def __getitem__(self, name: str) -> list[Any]:
        """The results of the case, rank by rank. Fails with the first failing rank's traceback."""
        while name in self.waiting:
            self.run()
        failure = self.failures.get(name)
        if failure is not None and NEEDS_NEWER in failure:
            pytest.skip(failure.strip().splitlines()[-1])
        assert failure is None, f"case {name!r}: {failure}"
        return self.results[name]

    def run(self) -> None:
        """Runs the waiting cases until one fails."""
        with tempfile.TemporaryDirectory() as folder:
            results, failure = run_cases(self.world, self.waiting, self.seconds, self.group, Path(folder))
        self.results |= results
        if failure is not None:
            self.failures[failure.case] = failure.message
        self.waiting = {
            name: case for name, case in self.waiting.items() if name not in self.results and name not in self.failures
        }


def launch(
    world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 240.0, group: bool = True
) -> list[Any]:
    """`function(*arguments)` on `world` ranks at once; their results, rank by rank. Fails with the first rank's
    traceback. group: with a process group of them all."""
    name = function.__name__
    return SharedRanks(world, {name: (function, *arguments)}, seconds, group)[name]


def launch_each(world: int, function: Callable[..., Any], *cases: tuple[Any, ...]) -> list[list[Any]]:
    """`function(*case)` for each case on the same ranks; for each case the results, rank by rank."""
    shared = SharedRanks(world, {f"{number}: {case}": (function, *case) for number, case in enumerate(cases)})
    return [shared[name] for name in [*shared.waiting]]


def run_cases(
    world: int, cases: Cases, seconds: float, group: bool, folder: Path
) -> tuple[dict[str, list[Any]], Failure | None]:
    """The results of the cases before the first one that fails. seconds: for each case."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks = [
        context.Process(target=_rank, args=(rank, world, folder, cases, group), daemon=True) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        message = wait(ranks, folder, seconds)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    done = finished(folder, world)
    names = [*cases]
    results = {
        name: [torch.load(folder / f"{rank}.{number}.result", weights_only=False) for rank in range(world)]
        for number, name in enumerate(names[:done])
    }
    if message is None:
        return results, None
    return results, Failure(names[min(done, len(names) - 1)], message)


def wait(ranks: list[BaseProcess], folder: Path, seconds: float) -> str | None:
    """Waits until all ranks have ended, one has failed, or a case takes longer. Says what went wrong."""
    done, deadline = 0, time.monotonic() + seconds
    while any(process.is_alive() for process in ranks):
        if (failed := problem(ranks, folder)) is not None:
            return failed
        if finished(folder, len(ranks)) > done:
            done, deadline = finished(folder, len(ranks)), time.monotonic() + seconds
        if time.monotonic() > deadline:
            return f"no end after {seconds} s"
        time.sleep(0.02)
    return problem(ranks, folder)


def problem(ranks: list[BaseProcess], folder: Path) -> str | None:
    """The ranks that died without an exception, and the first exception: that of another rank may be their consequence."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime)
    died = [
        f"rank {rank} ended with exit code {process.exitcode}"
        for rank, process in enumerate(ranks)
        if process.exitcode not in (None, 0) and not (folder / f"{rank}.error").exists()
    ]
    first = [f"rank {errors[0].stem}:\n{errors[0].read_text()}"] if errors else []
    return "\n".join([*died, *first]) or None


def finished(folder: Path, world: int) -> int:
    """How many cases all ranks have finished."""
    done = 0
    while all((folder / f"{rank}.{done}.result").exists() for rank in range(world)):
        done += 1
    return done


def _rank(rank: int, world: int, folder: Path, cases: Cases, group: bool) -> None:
    try:
        torch.set_num_threads(1)
        if group:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        for number, (function, *arguments) in enumerate(cases.values()):
            part = folder / f"{rank}.{number}.part"
            torch.save(function(*arguments), part)
            if group:
                dist.barrier()  # before the file has its name: a case that leaves ranks apart is not finished
            part.rename(part.with_suffix(".result"))
        if group:
            dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.text").write_text(traceback.format_exc())
        (folder / f"{rank}.text").rename(folder / f"{rank}.error")
        raise
