"""The layouts that training must not depend on, and the comparison of what five steps on two layouts gave."""

import functools

import pytest
import torch

from tests.helpers.steps import Outcome, train

SEQUENCE = ["--regularizers.lb.scope=sequence"]  # the default scope of v

# name -> (ranks, options of the layout)
LAYOUTS = {
    "dp2": (2, []),
    "dp4": (4, []),
    "hsdp2x2": (4, ["--parallelism.dp_replicate=2"]),
    "replicate2": (2, ["--parallelism.dp_replicate=2"]),
    "ep2": (2, ["--parallelism.ep=2"]),
    "ep4": (4, ["--parallelism.ep=4"]),
    "ep2dp2": (4, ["--parallelism.ep=2"]),
    "ep2hsdp2": (4, ["--parallelism.ep=2", "--parallelism.dp_replicate=2"]),
    "tp2": (2, ["--parallelism.tp=2"]),
    "tp2dp2": (4, ["--parallelism.tp=2"]),
    "ep2tp2": (4, ["--parallelism.ep=2", "--parallelism.tp=2"]),
    "cp2tp2": (4, ["--parallelism.cp=2", "--parallelism.tp=2"]),
    "cp2": (2, ["--parallelism.cp=2"]),
    "cp2ep2": (2, ["--parallelism.cp=2", "--parallelism.ep=2"]),
    "cp2dp2ep4": (4, ["--parallelism.cp=2", "--parallelism.ep=4"]),
}


@functools.cache
def alone(*words: str) -> Outcome:
    """The outcome of one process with these options."""
    return train(list(words), 1)


def assert_equal(outcome: Outcome, wanted: Outcome, tolerance: float = 1e-9) -> None:
    """Counts and chosen experts exactly; metrics and parameters (by the norm of the difference) to `tolerance`."""
    assert torch.equal(outcome.counts, wanted.counts)
    recorded = outcome.routing >= 0  # this rank's tokens; none when compiled, where no hook records the routing
    if recorded.any():
        assert torch.equal(outcome.routing[recorded], wanted.routing[recorded])
    for step, (row, other) in enumerate(zip(outcome.rows, wanted.rows, strict=True), start=1):
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=tolerance, abs=1e-14), f"{name} at step {step}"
    assert outcome.parameters.keys() == wanted.parameters.keys()
    for name, value in outcome.parameters.items():
        difference = (value - wanted.parameters[name]).norm()
        assert difference <= tolerance * wanted.parameters[name].norm() + 1e-14, f"{name}: {difference}"


def assert_every_token_seen(results: list[Outcome]) -> None:
    """Between them the ranks recorded the chosen experts of every token in every step and layer."""
    assert torch.stack([outcome.routing for outcome in results]).amax(0).min() >= 0
