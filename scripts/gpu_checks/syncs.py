"""Where the host waits for the device: per MoE layer and per training step.

On a card PyTorch reports every wait (`torch.cuda.set_sync_debug_mode`). A CPU has no such waits; there this counts the
operations that would be one: reading a number, and operations whose result's size depends on values. Kernels that only
a CPU has are not looked into, and the kernels in C are off, as their PyTorch counterparts are what a card runs.
"""

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import missing, our_layer, torchtitan_layer, transformers_layer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_checks.inputs import geometry
from gpu_checks.report import Report
from gpu_checks.timing import Work

ROOT = Path(__file__).resolve().parents[2]
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}
SIZES = {"aten::repeat_interleave", "aten::_unique2", "aten::unique_dim", "aten::bincount"}
COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.new_tensor}
"""Methods that copy between host and device, and that on a CPU are no operation of their own."""


class Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found, self.inside = found, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name
        given = (kwargs or {}).get("output_size")
        if not self.inside and (name in READS or (name in SIZES and given is None)):
            self.found[name.removeprefix("aten::")] += 1
        self.inside += name.startswith("titan_moe::")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside -= name.startswith("titan_moe::")


class Reads(TorchFunctionMode):
    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in COPIES and not self.operations.inside:
            self.operations.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(report: Report) -> Iterator[Counter[str]]:
    """Counts the waits inside, by place (on a card) or by operation (on a CPU)."""
    found: Counter[str] = Counter()
    if not report.on_card:
        operations = Operations(found)
        with operations, Reads(operations):
            yield found
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            found[f"{short(warning.filename)}:{warning.lineno}"] += 1


def short(path: str) -> str:
    """A file's path without what is the same for all files of a package."""
    if Path(path).is_relative_to(ROOT):
        return str(Path(path).relative_to(ROOT))
    return path.rpartition("site-packages/")[2]


def waits(report: Report, work: Work) -> Counter[str]:
    work()  # allocations, caches
    with counted(report) as found:
        work()
    return found


def row(report: Report, label: str, found: Counter[str]) -> int:
    places = ", ".join(f"{place} {count}" for place, count in found.most_common(6))
    report.row(label, sum(found.values()), places)
    return sum(found.values())


def layers(report: Report) -> None:
    """One MoE layer, forward and backward."""
    settings = geometry(report, "medium")
    x_TD = torch.randn(128 if report.toy else 4096, settings.dim, device=report.device, dtype=torch.bfloat16)
    ours: dict[str, dict[str, Any]] = {
        "no term": {},
        "lb, z, sp, cp": {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3},
        "sp by sample": {"sp": {"weight": 2e-3, "method": "sample"}},
        "sp by sketch": {"sp": {"weight": 2e-3, "method": "sketch"}},
        "cp, transition": {"cp": {"weight": 1e-3, "source": "transition"}},
        "o, v": {"o": 1e-3, "v": 1e-3},
        "erc": {"erc": 1.0},
    }
    counts: dict[str, int] = {}
    for label, weights in ours.items():
        with report.trial(f"our layer, {label}"):
            counts[label] = row(report, f"our layer, {label}", waits(report, our_layer(settings, weights, x_TD)))
    for label, package, build in (
        ("TorchTitan's layer", "torchtitan", torchtitan_layer),
        ("Transformers' layer", "transformers", transformers_layer),
    ):
        if missing(package):
            report.row(label, "not installed")
            continue
        with report.trial(label):
            counts[label] = row(report, label, waits(report, build(settings, x_TD)))
    if "TorchTitan's layer" in counts and "lb, z, sp, cp" in counts:
        report.fact("waits beyond TorchTitan's", counts["lb, z, sp, cp"] - counts["TorchTitan's layer"])


def stage(report: Report) -> None:
    if not report.on_card:
        os.environ["TITAN_MOE_KERNELS"] = "0"
    card = "How often the host waits for the device, and where."
    report.line(card if report.on_card else "Operations for which the host would wait for a card.")
    report.table("what", "waits", "where (the six most frequent)")
    layers(report)
    depths = [2, 4]
    totals = []
    for depth in depths:
        label = f"training step, {depth} layers"
        with report.trial(label):
            from gpu_checks.training import steps_of  # it needs the packages of a training run

            step = steps_of(report, {"": [f"--model.layers={depth}", "--compile.enable=false"]})[""]
            totals.append(row(report, label, waits(report, step)))
    if len(totals) == len(depths):
        per_layer = (totals[1] - totals[0]) / (depths[1] - depths[0])
        report.row("each layer of a step", f"{per_layer:g}")
        report.row("the rest of a step", f"{totals[0] - depths[0] * per_layer:g}")
