"""Pipeline parallelism, alone and combined with other dimensions: five steps equal those of one process.

The cases of a layout share their ranks."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.layouts import SEQUENCE, alone, assert_equal, assert_every_token_seen
from tests.helpers.ranks import SharedRanks, launch
from tests.helpers.steps import DEEPSEEK, VANILLA, Outcome, gradients, train

UNTIED = [*SEQUENCE, "--model.layers=4", "--model.tie_embeddings=false"]
TIED = [*SEQUENCE, "--model.layers=4", "--model.tie_embeddings=true"]
LAYOUTS = {
    "gpipe": (2, ["--parallelism.pp_schedule=GPipe", "--training.microbatch_size=2"]),
    "1f1b": (2, ["--training.microbatch_size=1"]),
    "interleaved": (2, ["--parallelism.pp_schedule=Interleaved1F1B", "--training.microbatch_size=2"]),
    "uneven": (2, ["--parallelism.pp_layers=[3,1]", "--training.microbatch_size=4"]),
    "one-micro-batch": (2, ["--parallelism.pp_schedule=GPipe"]),
    "ep2": (4, ["--parallelism.ep=2", "--training.microbatch_size=2"]),
    "tp2": (4, ["--parallelism.tp=2", "--training.microbatch_size=4"]),
    "cp2": (4, ["--parallelism.cp=2", "--training.microbatch_size=4"]),
    "dp2": (4, ["--training.microbatch_size=2"]),
    "hsdp2": (4, ["--parallelism.dp_replicate=2", "--training.microbatch_size=2"]),
    "four": (4, ["--training.microbatch_size=2"]),
    "dp2ep2": (8, ["--parallelism.ep=2", "--training.microbatch_size=1"]),
}


def layout_options(name: str) -> list[str]:
    return [f"--parallelism.pp={4 if name == 'four' else 2}", *LAYOUTS[name][1]]


EVERYDAY = {
    "1f1b": ["deepseek", "tied deepseek", "tied", "gradients", "tied gradients"],
    "interleaved": ["deepseek", "tied deepseek", "gradients"],
    "ep2": ["deepseek", "gradients"],
    "tp2": ["tied deepseek", "tied gradients"],
}
VANILLAS = [name for name in LAYOUTS if name not in ("dp2", "hsdp2")]
TIED_VANILLAS = ["gpipe", "dp2", "hsdp2", "ep2", "cp2", "four"]
VARIANTS = [
    ["--model.moe.first_dense_layers=2"],  # a stage without MoE layers
    ["--regularizers.cp.source=transition", "--regularizers.lb.scope=sequence"],
    ["--activation_checkpoint.mode=full"],
    ["--activation_checkpoint.mode=selective"],
    ["--regularizers.sp.method=sample", "--regularizers.cp.source=activated"],
]


def layout_of_variant(words: list[str]) -> str:
    """One microbatch where cp chooses its transitions over a microbatch."""
    return "one-micro-batch" if "transition" in words[0] else "1f1b"


@functools.cache
def everyday(name: str) -> SharedRanks:
    world = LAYOUTS[name][0]
    cases: dict[str, tuple[Any, ...]] = {}
    for case in EVERYDAY[name]:
        words = [*(TIED if "tied" in case else UNTIED), *(VANILLA if case == "tied" else DEEPSEEK)]
        function = gradients if "gradients" in case else train
        cases[case] = (function, [*words, *layout_options(name)], world)
    return SharedRanks(world, cases)


@functools.cache
def slow(name: str) -> SharedRanks:
    world = LAYOUTS[name][0]
    cases: dict[str, list[str]] = {}
    if name in VANILLAS:
        cases["vanilla"] = [*UNTIED, *VANILLA]
    if name in TIED_VANILLAS:
        cases["tied vanilla"] = [*TIED, *VANILLA]
    for words in VARIANTS:
        if layout_of_variant(words) == name:
            cases[" ".join(words)] = [*UNTIED, *DEEPSEEK, *words]
    return SharedRanks(world, {case: (train, [*words, *layout_options(name)], world) for case, words in cases.items()})


def check(results: list[Outcome], words: list[str]) -> None:
    assert_all_equal(results, alone(*words))
    assert_every_token_seen(results)


def assert_all_equal(results: list[Outcome], wanted: Outcome) -> None:
    """Every rank has some of the parameters; together they have all of them."""
    for result in results:
        names = result.parameters.keys()
        assert names <= wanted.parameters.keys()
        assert_equal(result, wanted._replace(parameters={name: wanted.parameters[name] for name in names}))
    assert set().union(*(result.parameters for result in results)) == wanted.parameters.keys()


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "ep2"])
def test_deepseek_style(name: str) -> None:
    check(everyday(name)["deepseek"], [*UNTIED, *DEEPSEEK])


@pytest.mark.slow
@pytest.mark.parametrize("name", VANILLAS)
def test_vanilla(name: str) -> None:
    check(slow(name)["vanilla"], [*UNTIED, *VANILLA])


@pytest.mark.slow
@pytest.mark.parametrize("words", VARIANTS)
def test_variants(words: list[str]) -> None:
    check(slow(layout_of_variant(words))[" ".join(words)], [*UNTIED, *DEEPSEEK, *words])


@pytest.mark.parametrize("name", ["1f1b", pytest.param("interleaved", marks=pytest.mark.slow), "tp2"])
def test_tied_embeddings(name: str) -> None:
    check(everyday(name)["tied deepseek"], [*TIED, *DEEPSEEK])


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED_VANILLAS)
def test_tied_embeddings_in_more_layouts(name: str) -> None:
    check(slow(name)["tied vanilla"], [*TIED, *VANILLA])


def test_both_copies_of_a_tied_embedding_stay_bitwise_equal() -> None:
    first, last = everyday("1f1b")["tied"]
    assert torch.equal(first.parameters["embedding"], last.parameters["embedding"])


@pytest.mark.parametrize("save_on_pipeline", [True, False])
def test_a_checkpoint_with_tied_embeddings_changes_layout(save_on_pipeline: bool, tmp_path: Path) -> None:
    """Saved by a pipeline and continued on one process, and the reverse: the same five steps."""
    words = [*TIED, *DEEPSEEK]
    layouts = [(2, [*words, *layout_options("1f1b")]), (1, words)]
    (saver, saving), (loader, loading) = layouts if save_on_pipeline else reversed(layouts)
    launch(saver, train, saving, saver, 3, 1, None, tmp_path)
    results = launch(loader, train, loading, loader, 5, 4, tmp_path)
    one = alone(*words)
    later = one._replace(rows=one.rows[3:], counts=one.counts[3:], routing=one.routing[3:])
    assert_all_equal(results, later)


@pytest.mark.parametrize(
    ("name", "words"), [("1f1b", UNTIED), ("interleaved", UNTIED), ("ep2", UNTIED), ("1f1b", TIED), ("tp2", TIED)]
)
def test_gradients_of_every_parameter(name: str, words: list[str]) -> None:
    wanted = gradients([*words, *DEEPSEEK], 1)
    results = everyday(name)["gradients" if words is UNTIED else "tied gradients"]
    for result in results:
        for parameter, grad in result.items():
            torch.testing.assert_close(grad, wanted[parameter], rtol=1e-9, atol=1e-12, msg=parameter)
    assert set().union(*results) == wanted.keys()


@pytest.mark.slow
def test_compiled() -> None:
    """The compiler reorders float64 sums: two steps stay within 1e-9."""
    world = LAYOUTS["1f1b"][0]
    words = [*UNTIED, *DEEPSEEK]
    compiled = [*words, *layout_options("1f1b"), "--compile.enable=true"]
    assert_all_equal(launch(world, train, compiled, world, 2, seconds=280), train(words, 1, 2))
