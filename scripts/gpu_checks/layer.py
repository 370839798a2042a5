"""One MoE layer, forward and backward, against other libraries' at the paper's sizes."""

import itertools
from collections.abc import Callable

import torch
from peers import missing, our_layer, sonicmoe_layer, torchtitan_layer, transformers_layer
from torch import Tensor

from gpu_checks.inputs import GEOMETRIES, geometry
from gpu_checks.report import Report
from gpu_checks.timing import Work, gib, median_time, peak_gib
from titan_moe.config.tables import Model

WEIGHTS = {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3}
Build = Callable[[Model, Tensor, str], Work]
OURS = {
    "ours, no term": lambda settings, x, backend: our_layer(settings, {}, x, backend),
    "ours, lb z sp cp": lambda settings, x, backend: our_layer(settings, WEIGHTS, x, backend),
}
PEERS: dict[str, tuple[str, Build]] = {
    "TorchTitan": ("torchtitan", torchtitan_layer),
    "Transformers' Mixtral": ("transformers", transformers_layer),
    "SonicMoE": ("sonicmoe", sonicmoe_layer),
}


def backend_of(report: Report) -> str:
    """Inductor needs a C++ compiler and half a minute per layer on a CPU; a toy checks the graphs and no more."""
    return "aot_eager" if report.toy else "inductor"


def stage(report: Report) -> None:
    """Eager at all sizes first, then compiled, as compiling takes long and the stage may be stopped."""
    builds: dict[str, Build] = dict(OURS)
    for label, (package, build) in PEERS.items():
        if missing(package):
            report.line(f"{label}: not installed")
        else:
            builds[label] = build
    counts = [128] if report.toy else [65536, 16384]
    backends = {"eager": "", "compiled": backend_of(report)}
    report.table("scale", "tokens", "layer", "mode", "ms", "TFLOP/s", "peak GiB beyond weights and input")
    best: dict[tuple[str, str], float] = {}
    for mode, count, name in itertools.product(backends, counts, GEOMETRIES[: 1 if report.toy else 3]):
        settings = geometry(report, name)
        moe = settings.moe
        flops = 6 * count * settings.dim * (3 * moe.top_k * moe.hidden_dim + moe.experts)
        x_TD = torch.randn(count, settings.dim, device=report.device, dtype=torch.bfloat16)
        for label, build in builds.items():
            if not report.enough(20, name, count, label, mode):
                continue
            if label == "SonicMoE" and mode != "eager":
                continue  # it refuses
            with report.trial(f"{name}, {count} tokens, {label}, {mode}"):
                torch.compiler.reset()
                work = build(settings, x_TD, backends[mode])
                ms = median_time(work, report.device, 0.05 if report.toy else 0.6)
                report.row(
                    name, count, label, mode, f"{ms:.3f}", f"{flops / ms / 1e9:.3g}", gib(peak_gib(work, report.device))
                )
                if count == counts[0]:
                    best[name, label] = min(ms, best.get((name, label), ms))
                    fact(report, name, best)
                del work
            if report.on_card:
                torch.cuda.empty_cache()


def fact(report: Report, name: str, best: dict[tuple[str, str], float]) -> None:
    """Keeps the ratio to TorchTitan's layer as soon as both are known, since the stage may be stopped."""
    ours, theirs = (best.get((name, label)) for label in ("ours, lb z sp cp", "TorchTitan"))
    if ours is not None and theirs is not None:
        report.fact(f"layer/{name}", ours / theirs)
