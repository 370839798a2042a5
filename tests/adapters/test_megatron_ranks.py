"""The losses in Megatron-Core models on several ranks: gradients by its schedule equal those of one process with the whole
batch, which are computed token by token."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers.megatron_judge import Judged, judged
from tests.helpers.megatron_models import (
    INSTALLED,
    Layout,
    Step,
    build,
    configuration,
    eightfold,
    micro_steps,
    needs_megatron,
    scheduled_step,
    start,
)
from tests.helpers.ranks import launch

pytestmark = needs_megatron

WEIGHTS = {"sp": 2.0, "cp": 1.0, "lb": 0.5, "v": 3.0}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
MOE_ACT = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}


class Case(NamedTuple):
    ranks: int
    layout: Layout
    microbatch: int = 1
    """Sequences of a data-parallel rank in a micro-batch."""
    per_token: bool = False
    padded: bool = False
    """Sequences of different lengths. Then only `per_token` gives the mean over tokens."""
    grouped: bool = False
    changes: dict[str, Any] = {}
    scopes: dict[str, Any] = {}

    @property
    def data_parallel(self) -> int:
        return self.ranks // (self.layout.tp * self.layout.pp)


EVERYDAY = {
    "experts on two ranks": Case(2, Layout(ep=2), per_token=True, padded=True),
    "two pipeline stages": Case(2, Layout(pp=2)),
}
TWO = {
    "data on two ranks": Case(2, Layout()),
    "data, per token": Case(2, Layout(), per_token=True, padded=True),
    "data, one micro-batch": Case(2, Layout(), microbatch=2),
    "data, activated": Case(2, Layout(), scopes={"moe_cp_source": "activated", "moe_lb_scope": "sequence"}),
    "data, transition": Case(2, Layout(), scopes={"moe_cp_source": "transition", "moe_v_scope": "global"}),
    "experts": Case(2, Layout(ep=2)),
    "experts, one micro-batch": Case(2, Layout(ep=2), microbatch=2, per_token=True),
    "experts, full recomputation": Case(2, Layout(ep=2), changes=FULL),
    "experts, recomputed MoE layers": Case(2, Layout(ep=2), changes=MOE),
    "experts, TEGroupedMLP, moe_act": Case(
        2,
        Layout(ep=2),
        per_token=True,
        padded=True,
        grouped=True,
        changes={"moe_grouped_gemm": True, "bias_activation_fusion": True, **MOE_ACT},
    ),
    "experts, loss scale": Case(2, Layout(ep=2), changes={"grad_scale_func": eightfold}),
    "experts, loss scale, moe_act": Case(
        2,
        Layout(ep=2),
        per_token=True,
        grouped=True,
        changes={"grad_scale_func": eightfold, "moe_grouped_gemm": True, **MOE_ACT},
    ),
    "experts, transition": Case(2, Layout(ep=2), scopes={"moe_cp_source": "transition"}),
    "stages, per token": Case(2, Layout(pp=2), per_token=True, padded=True),
    "stages, one micro-batch": Case(2, Layout(pp=2), microbatch=4),
    "stages, full recomputation": Case(2, Layout(pp=2), changes=FULL),
    "stages, TEGroupedMLP, moe_act": Case(2, Layout(pp=2), grouped=True, changes={"moe_grouped_gemm": True, **MOE_ACT}),
    # Two micro-batches: with four, messages between stages are mixed up over gloo, in Megatron's own models too.
    "interleaved stages": Case(2, Layout(pp=2, chunks=2), microbatch=2, changes=FULL),
    "tensors": Case(2, Layout(tp=2, ep=2)),
    "tensors, per token": Case(2, Layout(tp=2, ep=2), per_token=True, padded=True),
    "tensors, one micro-batch": Case(2, Layout(tp=2, ep=2), microbatch=4),
    "tensors, activated": Case(
        2,
        Layout(tp=2, ep=2),
        scopes={"moe_cp_source": "activated", "moe_lb_scope": "sequence", "moe_v_scope": "global"},
    ),
    "tensors, transition": Case(2, Layout(tp=2, ep=2), scopes={"moe_cp_source": "transition"}),
}
if INSTALLED and tuple(map(int, version("megatron-core").split(".")[:2])) >= (0, 19):
    # Before, Megatron's own gradients of experts are not summed over these ranks (its pull request 5916).
    TWO["tensors, experts on every rank"] = Case(2, Layout(tp=2))
FOUR = {
    "experts and tensors": Case(4, Layout(tp=2, ep=2)),
    "experts and tensors, per token": Case(4, Layout(tp=2, ep=2), per_token=True, padded=True),
    "experts on four ranks": Case(4, Layout(ep=4)),
    "experts and data": Case(4, Layout(ep=2), microbatch=1, per_token=True, padded=True),
    "experts and stages": Case(4, Layout(pp=2, ep=2), changes=FULL),
    "experts and interleaved stages, moe_act": Case(
        4, Layout(pp=2, ep=2, chunks=2), grouped=True, changes={"moe_grouped_gemm": True, **MOE_ACT}
    ),
    "tensors, experts and stages": Case(4, Layout(tp=2, pp=2, ep=2)),
}


def coefficients() -> dict[str, float]:
    return {f"moe_{name}_loss_coeff": weight for name, weight in WEIGHTS.items()}


def judge_all(cases: dict[str, Case], folder: Path) -> None:
    """Parameters, values and gradients of every case on one rank, as files."""
    start()
    for name, case in cases.items():
        plain = {key: value for key, value in case.changes.items() if not key.startswith("recompute")}
        model = build(configuration(special=False, **plain), special=False, grouped=case.grouped)
        fields = {key.removeprefix("moe_"): value for key, value in case.scopes.items()}
        steps = micro_steps(case.data_parallel, case.microbatch)
        whole = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        expected = judged(model, WEIGHTS, fields, steps, case.padded)
        torch.save((whole, tuple(expected)), folder / f"{name}.pt")


def step_all(cases: dict[str, Case], folder: Path) -> dict[str, tuple[Step, dict[str, float]]]:
    results = {}
    for name, case in cases.items():
        start(case.layout)
        whole, saved = torch.load(folder / f"{name}.pt")
        expected = Judged(*saved)
        changes = {**coefficients(), **case.changes, **case.scopes, "calculate_per_token_loss": case.per_token}
        step = scheduled_step(
            case.layout, whole, expected.gradients, case.microbatch, case.grouped, case.padded, **changes
        )
        results[name] = (step, expected.values)
    return results


Results = dict[str, list[tuple[Step, dict[str, float]]]]


def run(cases: dict[str, Case], folder: Path) -> Results:
    (ranks,) = {case.ranks for case in cases.values()}
    launch(1, judge_all, cases, folder, seconds=280)
    by_rank = launch(ranks, step_all, cases, folder, seconds=300)
    return {name: [one[name] for one in by_rank] for name in cases}


@pytest.fixture(scope="module")
def everyday(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(EVERYDAY, tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(TWO, tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(FOUR, tmp_path_factory.mktemp("judged"))


def check(case: Case, ranks: list[tuple[Step, dict[str, float]]]) -> None:
    for step, values in ranks:
        worst = max(step.errors, key=lambda name: step.errors[name])
        assert step.errors[worst] < 1e-5, worst  # float32, relative to the norm of the parameter's gradient
        if not case.padded:  # the log is a mean of the means of micro-batches and ranks
            assert step.values == pytest.approx(values, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("case", EVERYDAY)
def test_gradients_equal_those_of_one_process(case: str, everyday: Results) -> None:
    check(EVERYDAY[case], everyday[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO)
def test_gradients_on_two_ranks(case: str, on_two: Results) -> None:
    check(TWO[case], on_two[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_gradients_on_four_ranks(case: str, on_four: Results) -> None:
    check(FOUR[case], on_four[case])
