"""Whether this process sees a GPU, from the drivers' files and the environment. Does not import torch."""

import os
from pathlib import Path

DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))  # NVIDIA's and AMD's
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def gpu_here() -> bool:
    """True where a driver is loaded and no variable hides its devices."""
    hidden = any(os.environ.get(name, "0").strip() in ("", "-1") for name in HIDING)
    return not hidden and any(driver.exists() for driver in DRIVERS)


def prepare_process() -> None:
    """Settings of the allocators, before torch is imported. On a GPU blocks of memory may grow: the sizes of rows at the
    experts change from step to step, and fixed blocks would leave unusable gaps. On a CPU: `keep_freed_memory`."""
    from titan_moe.runtime.allocator import keep_freed_memory

    if not gpu_here():
        keep_freed_memory()
    elif not os.environ.get("PYTORCH_CUDA_ALLOC_CONF"):  # the older name of the same variable
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
