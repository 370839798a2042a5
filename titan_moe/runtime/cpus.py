"""How many CPUs this process may use: its affinity, and the limits of its control groups. Does not import torch."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
ALLOWED = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
"""CPUs that this process may use since it began (Linux); single threads may be bound to some of them later."""


def available_cpus() -> int:
    """The CPUs that this process may use, at least 1: a scheduler or a container may give it fewer than the machine has."""
    return max(1, math.floor(min(affinity(), cgroup_cpus())))


def cpus_of_rank() -> int:
    """This rank's part, at least 1, of the CPUs that the ranks of this node (LOCAL_WORLD_SIZE) share."""
    cpus, ranks = available_cpus(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    # With at most an n-th of the machine each, the n ranks have CPUs of their own: a scheduler has divided them already.
    return cpus if affinity() * ranks <= (os.cpu_count() or 1) else max(1, cpus // ranks)


def affinity() -> int:
    """The CPUs that the operating system lets this process run on."""
    return len(ALLOWED) if ALLOWED else os.cpu_count() or 1


def use_all_cpus() -> None:
    """Lets the calling thread run on every CPU of this process, when the thread that started it was bound to one."""
    if ALLOWED:
        os.sched_setaffinity(0, ALLOWED)


def cgroup_cpus(own: Path = OWN_CGROUPS, mounted: Path = CGROUPS) -> float:
    """The CPU time that control groups (version 1 or 2) allow this process, in CPUs; infinity without a limit.

    own: the file that lists this process's groups. mounted: where the groups are mounted.
    """
    return min(_limits(own, mounted), default=math.inf)


def _limits(own: Path, mounted: Path) -> Iterator[float]:
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [mounted, mounted / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [mounted / controllers, mounted / "cpu"]
        else:
            continue
        # A group's limit holds for all groups inside it. In a container the path may be the host's and not exist.
        inside = Path(path.lstrip("/"))
        for root in roots:
            for group in (root / inside, *(root / parent for parent in inside.parents)):
                if ".." in group.parts:
                    continue
                quota, _, period = _text(group / "cpu.max").partition(" ")
                quota, period = quota or _text(group / "cpu.cfs_quota_us"), period or _text(group / "cpu.cfs_period_us")
                if quota.strip().isdecimal() and period.strip().isdecimal() and int(period):
                    yield int(quota) / int(period)


def _text(path: Path) -> str:
    """A file's text; empty when there is no such file, or it can't be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def limit_threads(processes: int = 1) -> None:
    """Sets OMP_NUM_THREADS for this process, one of so many that share its CPUs. A number that the user has set stays.

    One process without a limit of its control group keeps torch's own default. Call it before torch is imported.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    cpus = available_cpus()
    if processes > 1 or cpus < affinity():
        os.environ["OMP_NUM_THREADS"] = str(max(1, cpus // processes))
