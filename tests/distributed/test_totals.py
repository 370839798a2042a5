"""Terms that are formed after the last layer: one all-reduce per microbatch, whatever the number of layers, and the values and
gradients of one process."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers.counting import counted
from tests.helpers.ranks import launch, launch_each
from tests.helpers.steps import VOCABULARY, batch_of, config_of, gradients, mesh_of, rank_part, train
from titan_moe.optim import build_optimizer
from titan_moe.parallel.parallelize import build_runner
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step

ALL_OFF = [f"--regularizers.{name}.weight=0" for name in ("lb", "z", "sp", "cp", "o", "v", "erc")]
EXPERTS, NUMBER_BYTES = 8, 8  # float64, and int64 counts


class Total(NamedTuple):
    """name: of the term. options: beside its weight. numbers: that ranks exchange per microbatch, of the layers."""

    name: str
    options: list[str]
    numbers: Callable[[int], int]

    def weighted(self, weight: float) -> list[str]:
        return [*ALL_OFF, f"--regularizers.{self.name}.weight={weight}", *self.options]


TOTALS = {
    "lb": Total("lb", [], lambda layers: layers * EXPERTS),
    "v": Total("v", ["--regularizers.v.scope=global"], lambda layers: layers * (EXPERTS + 1)),
    "cp": Total("cp", ["--regularizers.cp.source=transition"], lambda layers: (layers - 1) * EXPERTS**2),
}

# name -> (ranks, options of the layout, microbatches)
LAYOUTS = {
    "dp2": (2, ["--training.microbatch_size=1"], 4),
    "cp2": (2, ["--parallelism.cp=2", "--training.microbatch_size=4"], 2),
    "ep2": (2, ["--parallelism.ep=2", "--activation_checkpoint.mode=full"], 1),
    "dp2tp2": (4, ["--parallelism.tp=2", "--training.microbatch_size=2"], 2),
    "dp2pp2": (4, ["--parallelism.pp=2", "--training.microbatch_size=2"], 2),
}


def some_slow(*names: str) -> Any:
    """Every term on every layout; those of `names` on every run of the tests, the others with the slow ones."""
    return [
        pytest.param(
            total, layout, id=f"{name}-{layout}", marks=[] if f"{name}-{layout}" in names else [pytest.mark.slow]
        )
        for name, total in TOTALS.items()
        for layout in LAYOUTS
    ]


def all_reduces(words: list[str], world: int) -> tuple[int, int]:
    """Calls of all-reduce in one training step, and the bytes that this rank passes to them."""
    config = config_of(words, world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    optimizer, runner = build_optimizer(model, config.optimizer), build_runner(model, config, mesh)
    calls: Counter[str] = Counter()
    with counted(calls) as sent:
        train_step(runner, optimizer, rank_part(batch_of(1), config, mesh), config, mesh, 1, {})
    return calls["all-reduce"], sent["all-reduce"]


@pytest.mark.parametrize(("total", "name"), some_slow("lb-ep2", "v-ep2", "cp-ep2"))
def test_one_all_reduce_per_microbatch(total: Total, name: str) -> None:
    world, layout, microbatches = LAYOUTS[name]
    for layers in (3, 6):
        words = [*layout, f"--model.layers={layers}"]
        plain, more = launch_each(
            world, all_reduces, ([*ALL_OFF, *words], world), ([*total.weighted(0.01), *words], world)
        )
        last = range(world // 2, world) if "pp" in name else range(world)
        for rank, ((calls, size), (more_calls, more_size)) in enumerate(zip(plain, more, strict=True)):
            here = microbatches if rank in last else 0
            assert more_calls - calls == here
            reports = 8 * (2 if "pp" in name else 1)  # the term's value in the step's sums over data ranks, then stages
            assert more_size - size == here * total.numbers(layers) * NUMBER_BYTES + reports


@pytest.mark.parametrize(("total", "name"), some_slow("lb-dp2", "v-dp2", "cp-ep2"))
def test_gradients_are_those_of_one_process(total: Total, name: str) -> None:
    """The weight is so large that the cross-entropy can't hide an error of the term's gradient."""
    world, layout, microbatches = LAYOUTS[name]
    words = [*total.weighted(100), "--training.dtype=float64"]
    one = gradients([*words, f"--training.microbatch_size={8 // microbatches}"], 1)
    for found in launch(world, gradients, [*words, *layout], world):
        for parameter, gradient in found.items():
            torch.testing.assert_close(gradient, one[parameter], rtol=1e-9, atol=1e-12, msg=parameter)


@pytest.mark.slow
@pytest.mark.parametrize("total", TOTALS.values(), ids=TOTALS)
@pytest.mark.parametrize("layout", [["--parallelism.pp=2", "--training.microbatch_size=4"], []], ids=["pp2", "dp2"])
def test_a_total_can_be_measured_only(total: Total, layout: list[str]) -> None:
    """At weight 0 it has the value of a weighted one, that of one process, and no gradient."""
    untied = ["--model.tie_embeddings=false", "--model.layers=4"]
    microbatches = ["--training.microbatch_size=4"]  # of two data ranks with 2 sequences each, or of one
    words = [*untied, *(layout or ["--training.microbatch_size=2"])]
    only_measured = [*total.weighted(0), *words, f'--regularizers.measure=["{total.name}"]']
    plain, measured, weighted = launch_each(
        2, train, ([*ALL_OFF, *words], 2, 2), (only_measured, 2, 2), ([*total.weighted(0.01), *words], 2, 1)
    )
    one = train([*total.weighted(0.01), *untied, *microbatches], 1, 1)
    for found, wanted, other in zip(measured, plain, weighted, strict=True):
        assert found.rows[0][total.name] == pytest.approx(other.rows[0][total.name], rel=1e-12)
        assert found.rows[0][total.name] == pytest.approx(one.rows[0][total.name], rel=1e-12)
        assert all(torch.equal(value, wanted.parameters[name]) for name, value in found.parameters.items())
