"""The device a process computes on, its memory, and its peak speed."""

import os
import resource
import sys
import time
from collections.abc import Callable

import torch

from titan_moe.errors import UserError
from titan_moe.runtime.cards import find_card

GIB = 1024**3


def pick_device() -> torch.device:
    """The GPU of this process's local rank, or the CPU if there is no GPU. Raises UserError."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, gpus = int(os.environ.get("LOCAL_RANK") or "0"), torch.cuda.device_count()
    if gpus == 1:  # a scheduler may show each rank only its own
        number = 0
    if number >= gpus:
        raise UserError(f"environment: LOCAL_RANK = {number}, but this process sees {gpus} GPUs; start {gpus} ranks")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def make_deterministic() -> None:
    """Only operations that give the same result every time; to be called before the first product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses products on a GPU
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def peak_allocated(work: Callable[[], object]) -> int:
    """Peak of live CPU allocations made during `work`, in bytes. For benchmarks: it runs `work` under the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s, to compute MFU: from the data sheet for a known GPU, else measured with a large matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        card = find_card(torch.cuda.get_device_name(device))
        if card is not None:
            return card.bfloat16
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=torch.float32 if device.type == "cpu" else dtype, device=device)
    seconds = []
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
