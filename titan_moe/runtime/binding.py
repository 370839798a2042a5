"""Binds the threads of torch's OpenMP to CPUs, so that a busy process beside a run does not stop them together.

OpenMP threads spin while they wait for each other. Where they use all CPUs and another process is busy, the scheduler
often puts two of them onto one CPU; each then spins while the other should compute, and a step takes four times as long.
Bound to a CPU each, only the thread that shares its CPU with the other process is slowed (docs/benchmarks.md).

The variables of OpenMP (OMP_PROC_BIND) can't do it: a second OpenMP library, such as sentencepiece's, reads them too, is
loaded first, and binds the main thread to one CPU, which then is the only one that torch's sees.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from titan_moe.runtime.cpus import ALLOWED

CHOICES = ("OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
TOPOLOGY = Path("/sys/devices/system/cpu")
LOADED = Path("/proc/self/maps")


def bind_threads() -> bool:
    """Binds the calling thread, and the OpenMP threads that compute for it, to a core each. Returns whether it did.

    It does so where this process and those beside it (LOCAL_WORLD_SIZE) have as many threads as there are CPUs or cores
    that this process may use. With fewer, or with a variable of `CHOICES`, threads stay where the scheduler puts them.
    A thread or process that is started by the calling thread afterwards inherits its CPU; `use_all_cpus` undoes that.
    """
    threads = torch.get_num_threads()
    library = _openmp()
    if threads == 1 or library is None or any(os.environ.get(name) for name in CHOICES):
        return False
    local, ranks = (
        int(os.environ.get(name) or default) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    places = _places(threads * ranks)
    if not places:
        return False
    places = places[local * threads : (local + 1) * threads]

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def bind(_: int) -> None:
        os.sched_setaffinity(0, places[library.omp_get_thread_num()])

    library.GOMP_parallel(bind, None, threads, 0)
    return True


def _places(threads: int, topology: Path = TOPOLOGY) -> list[list[int]]:
    """CPUs for so many threads: all of a core for each, or one CPU for each; empty if neither gives that number."""
    cpus = sorted(ALLOWED or ())
    cores: dict[str, list[int]] = {}
    for cpu in cpus:
        try:
            siblings = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        cores.setdefault(siblings, []).append(cpu)
    candidates: Sequence[list[list[int]]] = (list(cores.values()), [[cpu] for cpu in cpus])
    return next((places for places in candidates if len(places) == threads), [])


def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP library that torch uses; None where it has another one (macOS, Windows, some builds)."""
    folder = Path(torch.__file__).resolve().parent / "lib"
    try:
        paths = {line.split(maxsplit=5)[-1] for line in LOADED.read_text().splitlines() if "libgomp" in line}
    except OSError:
        return None
    own = [path for path in sorted(paths) if Path(path).parent == folder or Path(path).parent.name == "torch.libs"]
    return ctypes.CDLL(own[0]) if own else None
