"""The C library's allocator. Nothing here imports torch, as it must be told before threads start."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks, for all threads together. By default it returns every large buffer to the system, and
    the page faults of getting it back cost a CPU two fifths of the backward pass (docs/benchmarks.md); and each thread keeps
    an arena of its own, where the buffers of background checkpoints pile up. Before threads start."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_ARENA_MAX, 1)
