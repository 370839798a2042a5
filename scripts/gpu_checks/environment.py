"""Versions, the card, and two ceilings that the other stages' times are compared with."""

import importlib.metadata
import os
import platform
import subprocess

import torch

from gpu_checks.report import Report
from gpu_checks.timing import GIB, median_time
from titan_moe.runtime.device import peak_flops
from torchtitan_ext.ops import select

PACKAGES = ["torch", "triton", "torchao", "torchdata", "transformers", "torchtitan", "sonicmoe", "numpy", "pydantic"]


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def stage(report: Report) -> None:
    report.table("what", "version")
    for package in PACKAGES:
        report.row(package, version_of(package))
    report.row("python", platform.python_version())
    report.row("CPU", f"{platform.machine()}, {os.cpu_count()} cores")
    report.row("kernels of ops/select.py", ", ".join(module.__name__.rpartition(".")[2] for module in select.KERNELS))
    if not report.on_card:
        report.row("card", "none")
        return
    properties = torch.cuda.get_device_properties(report.device)
    report.row(
        "card", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {properties.multi_processor_count} SMs"
    )
    report.row("capability", ".".join(map(str, torch.cuda.get_device_capability(report.device))))
    report.row("driver, power limit, clock", driver())
    report.row("CUDA", torch.version.cuda)
    report.row("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def ceilings(report: Report) -> None:
    """Copy bandwidth, and the speed of a large bfloat16 matrix product."""
    size, count = (256, 1 << 20) if report.toy else (8192, 1 << 31)
    a, b = (torch.randn(size, size, device=report.device, dtype=torch.bfloat16) for _ in range(2))
    teraflops = 2 * size**3 / median_time(lambda: a @ b, report.device) / 1e9
    source = torch.empty(count, dtype=torch.uint8, device=report.device)
    target = torch.empty_like(source)
    bandwidth = 2 * count / median_time(lambda: target.copy_(source), report.device) / 1e9
    sheet = peak_flops(report.device, torch.bfloat16) / 1e12
    report.table("ceiling", "measured", "peak that utilization is computed with")
    report.row(f"bfloat16 product, {size} x {size} x {size}", f"{teraflops:.3g} TFLOP/s", f"{sheet:.3g} TFLOP/s")
    report.row(f"copy of {count >> 20} MiB, read and written", f"{bandwidth:.3g} TB/s")
