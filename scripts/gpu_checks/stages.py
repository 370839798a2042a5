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


# Those that later work depends on most come first, since a machine may be taken away; a stage's unused time goes to the later
# ones, and the first stages, which also compile all kernels, have more than they should need.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("versions", "Versions and card", 10, "environment.stage"),
        Stage("ceilings", "Ceilings", 10, "environment.ceilings"),
        Stage("terms", "Every term and variant against the CPU", 110, "terms.stage"),
        Stage("empty", "Experts without tokens", 15, "empty_experts.stage"),
        Stage("head", "Vocabulary projection and cross-entropy", 15, "head.stage"),
        Stage("kernels", "Our kernels on and off", 50, "kernels.stage"),
        Stage("syncs", "Host waits for the device", 30, "syncs.stage"),
        Stage("step", "A training step with and without sp and cp", 90, "step.stage"),
        Stage("layer", "One MoE layer against other libraries'", 110, "layer.stage"),
        Stage("peers", "A training step against other libraries'", 70, "step.peers"),
        Stage("ranks", "Expert parallelism, FSDP and sums on one rank", 30, "all_to_all.stage"),
        Stage("profile", "The dearest kernels of a step", 25, "step.profile"),
        Stage("float8", "float8 on and off", 40, "step.float8"),
        Stage("compiled", "The MoE layer compiled and eager", 25, "compiled.stage"),
        Stage("resume", "A run that is killed and resumed", 90, "resume.stage"),
    )
}
