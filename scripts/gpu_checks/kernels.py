"""The MoE layer with this package's own kernels, and with PyTorch's operations in their place.

`torchtitan_ext/ops/select.py` knows which kernels there are for a device, and the environment variable
TITAN_MOE_KERNELS set to 0 turns them off. It is read once, so each side runs in a process of its own.
"""

import importlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import our_layer
from torch import Tensor

from gpu_checks.inputs import geometry
from gpu_checks.report import Report, python_path
from gpu_checks.timing import gib, median_time, peak_gib
from torchtitan_ext.ops import select

ARMS: dict[str, dict[str, Any]] = {
    "no term": {},
    "sp": {"sp": 2e-3},
    "sp by sample": {"sp": {"weight": 2e-3, "method": "sample"}},
    "cp": {"cp": 1e-3},
    "o": {"o": 1e-3},
    "lb, z, sp, cp": {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TIMED = torch.bfloat16
OFF = {"TITAN_MOE_KERNELS": "0"}


def operations(device: torch.device) -> list[str]:
    """`module.operation` of the kernels that would run on this device, for some type of a (64, 64) tensor; of the Triton
    kernels the modules."""
    found = []
    examples = [torch.ones(64, 64, device=device).to(t) for t in (torch.float32, torch.bfloat16, torch.int64)]
    for module in select.KERNELS:
        for name, function in vars(module).items():
            own = callable(function) and getattr(function, "__module__", "") == module.__name__
            if not own or name.startswith("_") or name in ("library", "supports"):
                continue
            if any(module.supports(name, example) for example in examples):
                found.append(f"{module.__name__.rpartition('.')[2]}.{name}")
    fused = getattr(select, "fused", None)
    if fused is not None and any(fused(example) for example in examples):
        folder = importlib.import_module("torchtitan_ext.kernels").__path__
        found += [f"kernels.{module.name}" for module in pkgutil.iter_modules(folder) if module.name != "operators"]
    return found


def arm(report: Report, label: str, dtype: torch.dtype, folder: Path) -> tuple[float, float] | None:
    """One arm of one side: writes its outcome into the folder; its time and memory, where they are measured."""
    settings = geometry(report, "medium")
    torch.manual_seed(0)
    x_TD = torch.randn(256, settings.dim, device=report.device).to(dtype)
    outcome = our_layer(settings, ARMS[label], x_TD)()
    torch.save([tensor.double().cpu() for tensor in outcome if tensor is not None], folder / f"{label}-{dtype}")
    if dtype != TIMED:
        return None
    count = 256 if report.toy else 65536
    work = our_layer(settings, ARMS[label], torch.randn(count, settings.dim, device=report.device).to(dtype))
    return median_time(work, report.device, 0.05 if report.toy else 1), peak_gib(work, report.device)


def measure(report: Report, folder: Path) -> None:
    """One side: prints a line of JSON for every arm and type, as they come; one that fails does not end the others."""
    print(json.dumps({"operations": operations(report.device)}), flush=True)
    for label, dtype in itertools.product(ARMS, TOLERANCE):
        line: dict[str, Any] = {"label": label, "dtype": str(dtype)}
        try:
            line["measured"] = arm(report, label, dtype, folder)
        except Exception as error:  # reported by the other process
            line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(json.dumps(line), flush=True)


def side(report: Report, folder: Path, variables: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Runs `measure` in a process with these environment variables; its lines, as they come."""
    folder.mkdir()
    environment = {**os.environ, **variables, "PYTHONPATH": python_path()}
    command = [sys.executable, "-W", "ignore", "-m", "gpu_checks.kernels", str(folder), str(int(report.toy))]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):  # packages print too
                yield json.loads(line)
        if process.wait():
            errors.seek(0)
            raise RuntimeError((errors.read().strip().splitlines() or [f"status {process.returncode}"])[-1])


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item() if wanted.numel() else 0.0


def stage(report: Report) -> None:
    names = operations(report.device)
    if not names:
        report.line(f"No kernel of ops/select.py runs on this device ({report.device.type}).")
        return
    report.line(f"Kernels: {', '.join(names)}.")
    report.table("terms", "type", "output", "terms", "gradient", "ms on", "ms off", "on / off", "GiB on", "GiB off")
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name) / "on", Path(name) / "off"
        left_on, *off = side(report, folders[1], OFF)
        if left_on["operations"]:
            raise RuntimeError(f"{OFF} leaves {left_on['operations']} on")
        plain = {(line["label"], line["dtype"]): line for line in off}
        for line in side(report, folders[0], {}):
            if "label" in line:
                with report.trial(line["label"]):
                    compare(report, line, plain[line["label"], line["dtype"]], folders)


def compare(report: Report, on: dict[str, Any], off: dict[str, Any], folders: tuple[Path, Path]) -> None:
    """A row: an arm with the kernels, and without."""
    for line, which in ((on, "on"), (off, "off")):
        if "error" in line:
            raise RuntimeError(f"kernels {which}: {line['error']}")
    label, dtype = on["label"], on["dtype"]
    outcomes = zip(*(torch.load(folder / f"{label}-{dtype}") for folder in folders), strict=True)
    tolerance = {str(kind): value for kind, value in TOLERANCE.items()}[dtype]
    cells = [report.equal(error(found, wanted), tolerance) for found, wanted in outcomes]
    if on["measured"] is not None:
        (ms_on, gib_on), (ms_off, gib_off) = on["measured"], off["measured"]
        cells += [f"{ms_on:.3f}", f"{ms_off:.3f}", f"{ms_on / ms_off:.3f}", gib(gib_on), gib(gib_off)]
    report.row(label, dtype[6:], *cells)


if __name__ == "__main__":
    measure(Report(toy=sys.argv[2] == "1", seconds=1e9, facts=Path(os.devnull)), Path(sys.argv[1]))
