"""Muon gives the same parameters on every layout as on one process: five steps in float64, all seven terms."""

import functools

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import launch
from tests.helpers.steps import DEEPSEEK, Outcome, train

MUON = ["--optimizer.name=muon", "--regularizers.lb.scope=sequence"]
LAYOUTS = {
    "dp2": (2, []),
    "hsdp2x2": (4, ["--parallelism.dp_replicate=2"]),
    "ep2": (2, ["--parallelism.ep=2"]),
    "ep2dp2": (4, ["--parallelism.ep=2"]),
    "tp2": (2, ["--parallelism.tp=2"]),
    "tp2dp2": (4, ["--parallelism.tp=2"]),
    "ep2tp2": (4, ["--parallelism.ep=2", "--parallelism.tp=2"]),
    "cp2ep2": (2, ["--parallelism.cp=2", "--parallelism.ep=2"]),
}


@functools.cache
def alone(*words: str) -> Outcome:
    return train(list(words), 1)


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert (value - wanted[name]).norm() <= 1e-9 * wanted[name].norm() + 1e-14, name


def check(world: int, degrees: list[str], words: list[str]) -> None:
    wanted = alone(*words)
    for found in launch(world, train, [*words, *degrees], world):
        assert torch.equal(found.counts, wanted.counts)
        assert_equal(found.parameters, wanted.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(*LAYOUTS[layout], [*DEEPSEEK, *MUON])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "model"),
    [
        (2, ["--model.dim=15", "--model.head_dim=6"]),
        (2, ["--model.moe.experts=5"]),
        (4, ["--model.moe.experts=3", "--model.moe.top_k=2"]),
    ],
    ids=["uneven width", "uneven experts", "fewer experts than ranks"],
)
def test_sharding_that_does_not_divide(world: int, model: list[str]) -> None:
    """FSDP then cuts experts by number, not by width; ranks get different numbers of experts to compute; or none."""
    check(world, [], [*DEEPSEEK, *MUON, *model])


@pytest.mark.slow
def test_pipeline_stages() -> None:
    words = [*DEEPSEEK, *MUON]
    found = launch(2, train, [*words, "--parallelism.pp=2", "--training.microbatch_size=4"], 2)
    wanted = alone(*words, "--training.microbatch_size=4").parameters
    assert_equal(found[0].parameters | found[1].parameters, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["--optimizer.muon.split_heads=false", "--optimizer.muon.adjust_lr=original"])
def test_options_matter_and_are_the_same_on_ranks(change: str) -> None:
    words = [*DEEPSEEK, *MUON]
    check(4, ["--parallelism.ep=2", "--parallelism.tp=2"], [*words, change])
    with_it, without = (
        alone(*options).parameters["layers.1.attention.wq.weight"] for options in ([*words, change], words)
    )
    assert (with_it - without).norm() > 1e-3 * without.norm()
