"""Writing checkpoints, in the step or behind its back.

A checkpoint is made in `.step-N`: every rank writes its tensors, state.json follows, the manifest last; then the folder is
renamed. In the background the same happens on copies, in a thread, over a process group of its own, one checkpoint at a time.
"""

import errno
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_moe.checkpoint.dcp import tensors, write_tensors
from titan_moe.checkpoint.manifest import Entry, entry_of, write_manifest
from titan_moe.checkpoint.run_dir import STATE_FILE, RunDir, fsync_file, fsync_folder
from titan_moe.config.tables import Checkpoint
from titan_moe.errors import TrainingError


class Saver:
    """Saves one model and its optimizer."""

    def __init__(
        self, run_dir: RunDir, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Checkpoint
    ) -> None:
        self.run_dir, self.model, self.optimizer, self.settings = run_dir, model, optimizer, settings
        # Of its own, so that a thread's collectives never meet the training's; and for the CPU, where the files are written.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.copies: dict[str, Tensor] = {}
        # One thread for the whole run: the memory that a thread allocated is not all given back when it ends.
        self.writer = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    @property
    def first(self) -> bool:
        return self.group is None or dist.get_rank() == 0

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """Writes checkpoint `step`, or begins to, and then deletes all but the newest ones. facts: what state.json holds
        beside the step. Raises OSError for a disk that takes no more; an earlier checkpoint's error is raised here too."""
        self.finish()
        text = json.dumps({"step": step, **facts}, indent=1)
        state = tensors(self.model, self.optimizer)
        if not self.settings.async_save:
            self.write(step, state, text)
            return
        self.copies = copied(state, self.copies)
        self.pending = self.writer.submit(self.write, step, self.copies, text)

    def finish(self) -> None:
        """Waits for the checkpoint that is being written. Raises what went wrong with it."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def write(self, step: int, state: dict[str, Tensor], text: str) -> None:
        final = self.run_dir.checkpoint(step)
        fresh = final.with_name(f".{final.name}")
        if self.first:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
        self.barrier()
        problem: OSError | None = None
        try:
            write_tensors(fresh, state, self.group)
            entries = self.entries(fresh)
            if self.first:
                self.complete(step, fresh, final, text, entries)
        except OSError as error:
            problem = error
        finally:
            if self.first:
                shutil.rmtree(fresh, ignore_errors=True)  # what a full disk left half written
        self.agree(problem)

    def entries(self, fresh: Path) -> dict[str, Entry]:
        """Of every rank's files: each reads its own."""
        rank = 0 if self.group is None else dist.get_rank()
        own: dict[str, Entry] | str
        try:
            own = {path.name: entry_of(path) for path in fresh.glob(f"__{rank}_*")}
        except OSError as error:
            own = f"rank {rank}: {error}"
        parts: list[dict[str, Entry] | str] = [own]
        if self.group is not None:
            parts *= dist.get_world_size()
            dist.all_gather_object(parts, own, group=self.group)
        found: dict[str, Entry] = {}
        for part in parts:
            if isinstance(part, str):
                raise OSError(errno.EIO, part, str(fresh))
            found |= part
        return found

    def complete(self, step: int, fresh: Path, final: Path, text: str, entries: dict[str, Entry]) -> None:
        """What the first rank does when all tensors are in place."""
        (fresh / STATE_FILE).write_text(text)
        fsync_file(fresh / STATE_FILE)
        write_manifest(fresh, step, entries | {name: entry_of(fresh / name) for name in (STATE_FILE, ".metadata")})
        fsync_folder(fresh)
        if final.exists():
            self.run_dir.set_aside(final, "it was made again")
        fresh.rename(final)
        fsync_folder(self.run_dir.checkpoints)
        for old in superfluous(self.run_dir.saved_steps(), self.settings.keep, self.settings.interval):
            shutil.rmtree(self.run_dir.checkpoint(old))

    def agree(self, problem: OSError | None) -> None:
        """Raises on every rank what went wrong on any."""
        if self.group is not None:
            found: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(found, None if problem is None else str(problem), group=self.group)
            other = next((text for text in found if text is not None), None)
            if problem is None and other is not None:
                raise TrainingError(f"another rank could not write the checkpoint: {other}")
        if problem is not None:
            raise problem

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def superfluous(steps: Sequence[int], keep: int, interval: int) -> list[int]:
    """Of saved steps, in order, those to delete: all but the newest, and the `keep` - 1 newest before it that lie on the
    interval. What a signal made between them goes as soon as there is a newer one, so that a run which was stopped and went on
    ends with the checkpoints of one that was not."""
    regular = [step for step in steps[:-1] if due(step, interval)]
    kept = regular[max(0, len(regular) - keep + 1) :]
    return [step for step in steps[:-1] if step not in kept]


def copied(state: dict[str, Tensor], copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the CPU's memory, into those of the checkpoint before where there are."""
    result = {}
    for name, x in state.items():
        own = x.to_local() if isinstance(x, DTensor) else x
        old = copies.get(name)
        copy = old.to_local() if isinstance(old, DTensor) else old
        if copy is None or copy.shape != own.shape:
            copy = torch.empty_like(own, device="cpu", pin_memory=own.is_cuda)
        copy.copy_(own, non_blocking=own.is_cuda)
        # Not `from_local`, which would move it to the mesh's device.
        result[name] = DTensor(copy, x._spec, requires_grad=False) if isinstance(x, DTensor) else copy
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result
