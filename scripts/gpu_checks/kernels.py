"""The MoE layer with this package's own kernels, and with PyTorch's operations in their place.

`torchtitan_ext/ops/select.py` knows which kernels there are for a device, and the environment variable
TITAN_MOE_KERNELS set to 0 turns them off. It is read once, so each side runs in a process of its own.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers import our_layer
from torch import Tensor

from gpu_checks.inputs import geometry
from gpu_checks.report import Report
from gpu_checks.timing import gib, median_time, peak_gib
from torchtitan_ext.ops import select

ROOT = Path(__file__).resolve().parents[2]
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


def measure(report: Report, folder: Path) -> None:
    """One side: writes the outcome of every arm and type, and the times, into a folder."""
    settings = geometry(report, "medium")
    times: dict[str, Any] = {"operations": operations(report.device)}
    for (label, weights), dtype in ((arm, dtype) for arm in ARMS.items() for dtype in TOLERANCE):
        torch.manual_seed(0)
        x_TD = torch.randn(256, settings.dim, device=report.device).to(dtype)
        outcome = our_layer(settings, weights, x_TD)()
        torch.save([tensor.double().cpu() for tensor in outcome if tensor is not None], folder / f"{label}-{dtype}")
        if dtype == TIMED:
            count = 256 if report.toy else 65536
            work = our_layer(settings, weights, torch.randn(count, settings.dim, device=report.device).to(dtype))
            times[label] = (median_time(work, report.device, 0.05 if report.toy else 1), peak_gib(work, report.device))
    (folder / "times.json").write_text(json.dumps(times))


def side(report: Report, folder: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Runs `measure` in a process with these environment variables, and returns its times."""
    folder.mkdir()
    paths = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    environment = {**os.environ, **variables, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "gpu_checks.kernels", str(folder), str(int(report.toy))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads((folder / "times.json").read_text())
    return found


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
        on, off = Path(name) / "on", Path(name) / "off"
        times_on, times_off = side(report, on, {}), side(report, off, OFF)
        if times_off["operations"]:
            raise RuntimeError(f"{OFF} leaves {times_off['operations']} on")
        for (label, _), (dtype, tolerance) in ((arm, one) for arm in ARMS.items() for one in TOLERANCE.items()):
            outcomes = zip(*(torch.load(folder / f"{label}-{dtype}") for folder in (on, off)), strict=True)
            errors = [report.equal(error(found, wanted), tolerance) for found, wanted in outcomes]
            cells: list[str] = []
            if dtype == TIMED:
                (ms_on, gib_on), (ms_off, gib_off) = times_on[label], times_off[label]
                cells = [f"{ms_on:.3f}", f"{ms_off:.3f}", f"{ms_on / ms_off:.3f}", gib(gib_on), gib(gib_off)]
            report.row(label, str(dtype)[6:], *errors, *cells)


if __name__ == "__main__":
    measure(Report(toy=sys.argv[2] == "1", seconds=1e9, facts=Path(os.devnull)), Path(sys.argv[1]))
