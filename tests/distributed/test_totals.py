"""lb of scope `global`: one all-reduce per microbatch, whatever the number of layers, and the gradients of one process."""

from collections import Counter

import pytest
import torch

from tests.helpers.counting import counted
from tests.helpers.ranks import launch, launch_each
from tests.helpers.steps import VOCABULARY, batch_of, config_of, gradients, mesh_of, rank_part, train
from titan_moe.optim import build_optimizer
from titan_moe.parallel.parallelize import build_runner
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step

OTHERS_OFF = [f"--regularizers.{name}.weight=0" for name in ("z", "sp", "cp", "o", "v", "erc")]
WITHOUT = "--regularizers.lb.weight=0"
EXPERTS, COUNT_BYTES = 8, 8

# name -> (ranks, options of the layout, microbatches)
LAYOUTS = {
    "dp2": (2, ["--training.microbatch_size=1"], 4),
    "cp2": (2, ["--parallelism.cp=2", "--training.microbatch_size=4"], 2),
    "ep2": (2, ["--parallelism.ep=2", "--activation_checkpoint.mode=full"], 1),
    "dp2tp2": (4, ["--parallelism.tp=2", "--training.microbatch_size=2"], 2),
    "dp2pp2": (4, ["--parallelism.pp=2", "--training.microbatch_size=2"], 2),
}


def all_reduces(words: list[str], world: int) -> tuple[int, int]:
    """Calls of all-reduce in one training step, and the bytes that this rank passes to them."""
    config = config_of([*OTHERS_OFF, *words], world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    optimizer, runner = build_optimizer(model, config.optimizer), build_runner(model, config, mesh)
    calls: Counter[str] = Counter()
    with counted(calls) as sent:
        train_step(runner, optimizer, rank_part(batch_of(1), config, mesh), config, mesh, 1, {})
    return calls["all-reduce"], sent["all-reduce"]


@pytest.mark.parametrize("layers", [3, 6])
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_all_reduce_per_microbatch(name: str, layers: int) -> None:
    world, layout, microbatches = LAYOUTS[name]
    words = [*layout, f"--model.layers={layers}"]
    plain, more = launch_each(world, all_reduces, ([*words, WITHOUT], world), (words, world))
    last = range(world // 2, world) if "pp" in name else range(world)
    for rank, ((calls, size), (more_calls, more_size)) in enumerate(zip(plain, more, strict=True)):
        here = microbatches if rank in last else 0
        assert more_calls - calls == here
        reports = 8 * (2 if "pp" in name else 1)  # the term's value in the step's sums over data ranks, then stages
        assert more_size - size == here * layers * EXPERTS * COUNT_BYTES + reports


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_one_process(name: str) -> None:
    """lb's weight is so large that the cross-entropy can't hide an error of its gradient."""
    world, layout, microbatches = LAYOUTS[name]
    words = [*OTHERS_OFF, "--regularizers.lb.weight=100", "--training.dtype=float64"]
    one = gradients([*words, f"--training.microbatch_size={8 // microbatches}"], 1)
    for found in launch(world, gradients, [*words, *layout], world):
        for parameter, gradient in found.items():
            torch.testing.assert_close(gradient, one[parameter], rtol=1e-9, atol=1e-12, msg=parameter)


@pytest.mark.parametrize("layout", [["--parallelism.pp=2", "--training.microbatch_size=4"], []])
def test_lb_can_be_measured_only(layout: list[str]) -> None:
    """At weight 0 it has the value of a weighted one, and no gradient."""
    words = [
        *OTHERS_OFF,
        WITHOUT,
        "--model.tie_embeddings=false",
        "--model.layers=4",
        *(layout or ["--training.microbatch_size=2"]),
    ]
    plain, measured, weighted = launch_each(
        2,
        train,
        (words, 2, 2),
        ([*words, '--regularizers.measure=["lb"]'], 2, 2),
        ([*words, "--regularizers.lb.weight=0.01"], 2, 1),
    )
    for found, wanted, other in zip(measured, plain, weighted, strict=True):
        assert found.rows[0]["lb"] == pytest.approx(other.rows[0]["lb"], rel=1e-12)
        assert all(torch.equal(value, wanted.parameters[name]) for name, value in found.parameters.items())
