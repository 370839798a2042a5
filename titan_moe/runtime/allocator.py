"""Settings of the C library's memory allocator. Does not import torch, which starts threads."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, in one arena for all threads. Call it before any thread starts.

    By default glibc returns every large buffer to the system, and the page faults of getting it back cost a CPU two
    fifths of the backward pass (docs/benchmarks.md). Also, each thread would keep an arena of its own, so that the
    buffers of checkpoints written in the background would pile up."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_ARENA_MAX, 1)
