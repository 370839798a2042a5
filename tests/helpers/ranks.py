"""Real process groups on this machine: gloo over a file, one thread per rank, a hard time limit, nothing left
behind."""

import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once by the server that ranks are forked from, so that a rank starts in a tenth of a second.
PRELOAD = ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "titan_moe.train.trainer", "torch._dynamo"]


def launch(
    world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 240.0, group: bool = True
) -> list[Any]:
    """`function(*arguments)` on `world` ranks at once; their results, rank by rank. Fails with the first rank's
    traceback. group: with a process group of them all."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, function, arguments, group), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + seconds
        try:
            while any(process.is_alive() for process in ranks) and not list(folder.glob("*.error")):
                assert time.monotonic() < deadline, f"{function.__name__}: no end after {seconds} s"
                time.sleep(0.02)
            errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime)
            assert not errors, f"{errors[0].name}:\n{errors[0].read_text()}"
            assert all(process.exitcode == 0 for process in ranks), [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world)]


def _rank(
    rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...], group: bool
) -> None:
    try:
        torch.set_num_threads(1)
        if not group:
            torch.save(function(*arguments), folder / f"{rank}.result")
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        result = function(*arguments)
        torch.save(result, folder / f"{rank}.result")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.part").write_text(traceback.format_exc())
        (folder / f"{rank}.part").rename(folder / f"{rank}.error")
        raise
