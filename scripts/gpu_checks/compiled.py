"""The MoE layer compiled against the same layer eager: output, terms and gradient."""

import torch
from peers import our_layer

from gpu_checks.inputs import geometry
from gpu_checks.kernels import error
from gpu_checks.layer import backend_of
from gpu_checks.report import Report

ARMS = {
    "no term": {},
    "lb, z, sp, cp": {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3},
    "o, v, erc": {"o": 1e-3, "v": 1e-3, "erc": 1.0},
}


def stage(report: Report) -> None:
    report.line(f"{__doc__} bfloat16, to 2e-2: a compiler may keep more digits between operations.")
    report.table("terms", "output", "terms", "gradient of the input")
    settings = geometry(report, "medium")
    for label, weights in ARMS.items():
        if not report.enough(20, label):
            continue
        with report.trial(label):
            outcomes = []
            for backend in ("", backend_of(report)):
                torch.compiler.reset()
                torch.manual_seed(0)
                x_TD = torch.randn(128 if report.toy else 4096, settings.dim, device=report.device).bfloat16()
                outcomes.append(our_layer(settings, weights, x_TD, backend)())
            pairs = zip(*outcomes, strict=True)
            cells = [
                report.equal(error(compiled.double(), eager.double()), 2e-2)
                for eager, compiled in pairs
                if eager is not None and compiled is not None
            ]
            report.row(label, *cells)
