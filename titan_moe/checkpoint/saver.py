"""Writes checkpoints, synchronously or in a background thread.

A checkpoint is written into `.step-N`: every rank's tensors, then state.json, then the manifest; then the directory is
renamed. The background thread does the same with copies of the tensors and its own process group, one at a time.
"""

import contextlib
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

from titan_moe.checkpoint.dcp import PlanCache, tensors, write_tensors
from titan_moe.checkpoint.manifest import Entry, UnreadableError, entry_of, write_manifest
from titan_moe.checkpoint.run_dir import RunDir, all_steps, fsync_file, fsync_folder, looks_whole, remove
from titan_moe.checkpoint.state import STATE_FILE
from titan_moe.config.tables import Checkpoint
from titan_moe.errors import TrainingError
from titan_moe.runtime.cpus import use_all_cpus


class Saver:
    """Saves a model and its optimizer."""

    def __init__(
        self, run_dir: RunDir, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Checkpoint
    ) -> None:
        self.run_dir, self.model, self.optimizer, self.settings = run_dir, model, optimizer, settings
        # A separate group, since the thread's collectives must not interleave with training's.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.copies: dict[str, Tensor] = {}
        self.plans = PlanCache()
        # One thread for the whole run: memory that a thread allocated is not all returned to the system when it ends.
        self.writer = ThreadPoolExecutor(1, initializer=start_writer, initargs=(next(model.parameters()).device,))
        self.pending: Future[None] | None = None
        self.outdated = False
        """Whether a checkpoint was saved since old ones were deleted."""

    @property
    def first(self) -> bool:
        return self.group is None or dist.get_rank() == 0

    def save(self, step: int, other_state: dict[str, Any]) -> None:
        """Writes checkpoint `step`, or starts to in the background. A collective. other_state: content of state.json.
        Raises OSError when this or the previous checkpoint could not be written."""
        self.finish()
        self.delete_old()
        self.outdated = True
        text = json.dumps({"step": step, **other_state}, indent=1)
        state = tensors(self.model, self.optimizer)
        if not self.settings.async_save:
            self.write(step, state, text)
            return
        self.copies = copied(state, self.copies)
        self.pending = self.writer.submit(self.write, step, self.copies, text)

    def finish(self) -> None:
        """Waits for the checkpoint that the background thread is writing. Raises its error."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def delete_old(self) -> None:
        """Deletes old checkpoints, once the newest is written. To be called when a finite step was made from it: until then
        the one before is the newest that is known to be good."""
        if self.outdated and (self.pending is None or self.pending.done()):
            self.outdated = False
            if self.first:
                for old in steps_to_delete(readable_steps(self.run_dir), self.settings.keep, self.settings.interval):
                    remove(self.run_dir.checkpoint(old))

    def write(self, step: int, state: dict[str, Tensor], text: str) -> None:
        final = self.run_dir.checkpoint(step)
        temporary = final.with_name(f".{final.name}")
        if self.first:
            if temporary.is_symlink() or temporary.exists():
                remove(temporary)
            temporary.mkdir()
        self.barrier()
        problem: OSError | None = None
        try:
            write_tensors(temporary, state, self.group, self.plans.planner())
            entries = self.entries(temporary)
            if self.first:
                self.finalize(step, temporary, final, text, entries)
        except OSError as error:
            problem = error
        finally:
            if self.first:
                shutil.rmtree(temporary, ignore_errors=True)  # exists only when writing failed
        self.raise_on_every_rank(problem)

    def entries(self, temporary: Path) -> dict[str, Entry]:
        """Manifest entries of all tensor files; every rank reads the files that it wrote."""
        rank = 0 if self.group is None else dist.get_rank()
        ours: dict[str, Entry] | str
        try:
            ours = {path.name: entry_of(path) for path in temporary.glob(f"__{rank}_*")}
        except OSError as error:
            ours = f"rank {rank}: {error}"
        parts: list[dict[str, Entry] | str] = [ours]
        if self.group is not None:
            parts *= dist.get_world_size()
            dist.all_gather_object(parts, ours, group=self.group)
        entries: dict[str, Entry] = {}
        for part in parts:
            if isinstance(part, str):
                raise OSError(errno.EIO, part, str(temporary))
            entries |= part
        return entries

    def finalize(self, step: int, temporary: Path, final: Path, text: str, entries: dict[str, Entry]) -> None:
        """On rank 0, once all tensors are written: state.json, manifest and rename."""
        (temporary / STATE_FILE).write_text(text)
        fsync_file(temporary / STATE_FILE)
        others = {name: entry_of(temporary / name) for name in (STATE_FILE, ".metadata")}
        write_manifest(temporary, step, entries | others)
        fsync_folder(temporary)
        if final.exists():
            self.run_dir.set_aside(final, "it was written again")
        temporary.rename(final)
        fsync_folder(self.run_dir.checkpoints)

    def raise_on_every_rank(self, problem: OSError | None) -> None:
        """Raises on every rank when writing failed on any."""
        if self.group is not None:
            messages: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(messages, None if problem is None else str(problem), group=self.group)
            other = next((text for text in messages if text is not None), None)
            if other is not None:
                self.plans.forget()
            if problem is None and other is not None:
                raise TrainingError(f"another rank could not write the checkpoint: {other}")
        if problem is not None:
            raise problem

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)


def start_writer(device: torch.device) -> None:
    """Begins the writing thread: on every CPU, and with the training thread's GPU, for a new thread has the first one."""
    use_all_cpus()
    if device.type == "cuda":
        torch.cuda.set_device(device)


def readable_steps(run_dir: RunDir) -> list[int]:
    """Steps of the finished checkpoints, oldest first, without those that can't be read now: they are not deleted."""
    steps = []
    for step in all_steps(run_dir.checkpoints):
        with contextlib.suppress(UnreadableError):
            if looks_whole(run_dir.checkpoint(step)):
                steps.append(step)
    return steps


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def steps_to_delete(steps: Sequence[int], keep: int, interval: int) -> list[int]:
    """Saved steps to delete: all but the newest and the `keep` - 1 newest multiples of the interval before it.

    So a checkpoint that a signal caused is deleted once there is a newer one: a run that was stopped and resumed ends
    with the same checkpoints as one that was not. steps: sorted."""
    regular = [step for step in steps[:-1] if due(step, interval)]
    kept = regular[max(0, len(regular) - keep + 1) :]
    return [step for step in steps[:-1] if step not in kept]


def copied(state: dict[str, Tensor], copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all tensors in CPU memory; reuses `copies` (of the previous checkpoint) where the shape is the same."""
    result = {}
    for name, x in state.items():
        ours = x.to_local() if isinstance(x, DTensor) else x
        reusable = copies.get(name)
        copy = reusable.to_local() if isinstance(reusable, DTensor) else reusable
        if copy is None or copy.shape != ours.shape:
            copy = torch.empty_like(ours, device="cpu", pin_memory=ours.is_cuda)
        copy.copy_(ours, non_blocking=ours.is_cuda)
        # `from_local` would move the copy to the mesh's device.
        result[name] = DTensor(copy, x._spec, requires_grad=False) if isinstance(x, DTensor) else copy
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result
