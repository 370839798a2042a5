"""torch.profiler traces of a few steps, for Perfetto or chrome://tracing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from titan_moe.config.tables import Profiling


class _Off:
    def step(self) -> None:
        """No-op."""


@contextlib.contextmanager
def profiler(settings: Profiling, folder: Path) -> Iterator[Any]:
    """Yields an object whose `step()` is to be called after every training step. Traces are written to `folder`."""
    if not settings.enable:
        yield _Off()
        return
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(
        skip_first=max(settings.start - 2, 0),
        wait=0,
        warmup=min(settings.start - 1, 1),
        active=settings.steps,
        repeat=1,
    )
    handler = torch.profiler.tensorboard_trace_handler(str(folder), use_gzip=True)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=handler) as profile:
        yield profile
