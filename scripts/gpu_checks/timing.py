"""Times and peak memory: CUDA events on a card, the wall clock on a CPU; medians after a warm-up."""

import statistics
import time
from collections.abc import Callable

import torch

GIB = 1024**3
Work = Callable[[], object]


def milliseconds(work: Work, device: torch.device) -> float:
    """The time of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize(device)
    return float(start_event.elapsed_time(end_event))


def median_time(work: Work, device: torch.device, seconds: float = 0.8, least: int = 3, most: int = 200) -> float:
    """Median milliseconds of a call, over about this many seconds of calls, after two that are not counted."""
    for _ in range(2):
        work()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < least or (time.monotonic() < end and len(times) < most):
        times.append(milliseconds(work, device))
    return statistics.median(times)


def alternating(
    a: Work, b: Work, pairs: int, device: torch.device, until: Callable[[], bool]
) -> list[tuple[float, float]]:
    """Milliseconds of both, in pairs whose order is reversed every second time. Ends early when `until()`, after three."""
    for work in (a, b, a, b):
        work()
    found: list[tuple[float, float]] = []
    while len(found) < pairs and not (len(found) >= 3 and until()):
        if len(found) % 2:
            second, first = milliseconds(b, device), milliseconds(a, device)
        else:
            first, second = milliseconds(a, device), milliseconds(b, device)
        found.append((first, second))
    return found


def peak_gib(work: Work, device: torch.device) -> float:
    """Peak GiB during one call, beyond what is allocated before it. NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / GIB


def gib(value: float) -> str:
    """GiB for a cell; empty where it was not measured."""
    return "" if value != value else f"{value:.2f}"
