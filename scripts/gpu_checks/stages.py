"""The stages in their order: what each is called, shows, and needs of the time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gpu_checks.report import Report


class Stage(NamedTuple):
    name: str
    title: str
    weight: float
    """Its part of the time, against those of the stages after it."""
    function: str
    """Module of this folder, and function."""

    def run(self, report: Report) -> None:
        module, function = self.function.split(".")
        getattr(importlib.import_module(f"gpu_checks.{module}"), function)(report)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("versions", "Versions and card", 10, "environment.stage"),
        Stage("ceilings", "Ceilings", 10, "environment.ceilings"),
        Stage("terms", "Every term and variant against the CPU", 80, "terms.stage"),
        Stage("empty", "Experts without tokens", 15, "empty_experts.stage"),
        Stage("ranks", "Expert parallelism, FSDP and sums on one rank", 30, "all_to_all.stage"),
        Stage("syncs", "Host waits for the device", 35, "syncs.stage"),
        Stage("kernels", "Our kernels on and off", 40, "kernels.stage"),
        Stage("compiled", "The MoE layer compiled and eager", 30, "compiled.stage"),
        Stage("step", "A training step with and without sp and cp", 90, "step.stage"),
        Stage("peers", "A training step against other libraries'", 60, "step.peers"),
        Stage("profile", "The dearest kernels of a step", 25, "step.profile"),
        Stage("float8", "float8 on and off", 45, "step.float8"),
        Stage("resume", "A run that is killed and resumed", 90, "resume.stage"),
        Stage("layer", "One MoE layer against other libraries'", 130, "layer.stage"),
    )
}
