"""No layout changes the result: five steps with all seven terms, in float64, against one process.

The cases of a layout share their ranks."""

import functools
from typing import Any

import pytest
import torch

from tests.helpers.layouts import LAYOUTS, SEQUENCE, alone, assert_equal, assert_every_token_seen
from tests.helpers.ranks import SharedRanks, launch
from tests.helpers.steps import DEEPSEEK, VANILLA, Outcome, gradients, train

GLOBAL = ["--regularizers.lb.scope=global", "--regularizers.v.scope=global"]


FLOAT32 = ["--training.dtype=float32"]

VARIANTS = {
    "global-scopes": GLOBAL,
    "sample": ["--regularizers.sp.method=sample", "--regularizers.sp.sample_fraction=0.4"],
    "sketch": ["--regularizers.sp.method=sketch", "--regularizers.sp.sketch_dim=6"],
    "measured": ["--regularizers.sp.weight=0", "--regularizers.erc.weight=0", "--regularizers.measure=sp,erc"],
    "transition": ["--regularizers.cp.source=transition"],
    "activated-code": [
        "--regularizers.cp.source=activated",
        "--regularizers.o.variant=code",
        "--regularizers.v.variant=code",
    ],
    "full": ["--activation_checkpoint.mode=full"],
    "selective": ["--activation_checkpoint.mode=selective", "--regularizers.sp.method=sample"],
    "keep-gathered": ["--parallelism.reshard_after_forward=false"],
    "documents-gqa": ["--model.document_mask=true", "--model.kv_heads=1", "--model.qk_norm=true"],
    "untied": ["--model.tie_embeddings=false"],
}
VARIED = ["ep2dp2", "cp2dp2ep4", "ep2tp2"]
ACCUMULATING = ["hsdp2x2", "ep2dp2", "cp2ep2", "tp2dp2"]
WITH_GRADIENTS = ["dp2", "hsdp2x2", "ep2", "cp2", "tp2", "cp2dp2ep4", "ep2tp2"]
IN_FLOAT32 = ["hsdp2x2", "cp2dp2ep4", "ep2tp2"]


@functools.cache
def everyday(layout: str) -> SharedRanks:
    world, degrees = LAYOUTS[layout]
    words = [*DEEPSEEK, *SEQUENCE, *degrees]
    cases: dict[str, tuple[Any, ...]] = {"deepseek": (train, words, world)}
    if layout in WITH_GRADIENTS:
        cases["gradients"] = (gradients, words, world)
    if layout in IN_FLOAT32:
        cases["float32"] = (train, [*words, *FLOAT32], world, 3)
    return SharedRanks(world, cases)


@functools.cache
def slow(layout: str) -> SharedRanks:
    world, degrees = LAYOUTS[layout]
    cases = {"vanilla": [*VANILLA, *SEQUENCE]}
    if layout in VARIED:
        cases |= {name: [*DEEPSEEK, *SEQUENCE, *words] for name, words in VARIANTS.items() if possible(name, layout)}
    if layout in ACCUMULATING:
        data = world // (2 if "cp2" in layout or "tp2" in layout else 1)
        for defer in ("true", "false"):
            cases[f"defer={defer}"] = [*accumulation(defer), f"--training.microbatch_size={4 // data}"]
    return SharedRanks(world, {name: (train, [*words, *degrees], world) for name, words in cases.items()})


def possible(variant: str, layout: str) -> bool:
    """One key-value head can't be cut in two."""
    return (variant, layout) != ("documents-gqa", "ep2tp2")


def accumulation(defer: str) -> list[str]:
    return [*DEEPSEEK, *SEQUENCE, f"--parallelism.defer_reduction={defer}"]


def check(results: list[Outcome], words: list[str]) -> None:
    wanted = alone(*words)
    for found in results:
        assert_equal(found, wanted)
    assert_every_token_seen(results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepseek_style(layout: str) -> None:
    check(everyday(layout)["deepseek"], [*DEEPSEEK, *SEQUENCE])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vanilla(layout: str) -> None:
    check(slow(layout)["vanilla"], [*VANILLA, *SEQUENCE])


@pytest.mark.slow
@pytest.mark.parametrize("layout", VARIED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, layout: str) -> None:
    """The baseline has the same micro-steps, so that scope `global` means the same tokens; recomputation is not in
    it."""
    if not possible(variant, layout):
        pytest.skip("one key-value head can't be cut in two")
    check(slow(layout)[variant], [*DEEPSEEK, *SEQUENCE, *VARIANTS[variant]])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ACCUMULATING)
@pytest.mark.parametrize("defer", ["true", "false"])
def test_accumulation(layout: str, defer: str) -> None:
    """Two micro-steps on the layout, and one, two or as many as sequences on one process."""
    found = slow(layout)[f"defer={defer}"][0]
    for size in (1, 4, 8):
        assert_equal(found, alone(*accumulation(defer), f"--training.microbatch_size={size}"))


def test_global_scope_with_accumulation() -> None:
    """The same micro-steps: four sequences each, on one process and on two."""
    found = launch(2, train, [*GLOBAL, "--training.microbatch_size=2", "--parallelism.ep=2"], 2)[0]
    assert_equal(found, alone(*GLOBAL, "--training.microbatch_size=4"))


@functools.cache
def gradients_alone() -> dict[str, torch.Tensor]:
    return gradients([*DEEPSEEK, *SEQUENCE], 1)


@pytest.mark.parametrize("layout", WITH_GRADIENTS)
def test_gradients_of_every_parameter(layout: str) -> None:
    wanted = gradients_alone()
    for found in everyday(layout)["gradients"]:
        assert found.keys() == wanted.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


@functools.cache
def float32_alone() -> Outcome:
    return train([*DEEPSEEK, *SEQUENCE, *FLOAT32], 1, 3)


@pytest.mark.parametrize("layout", IN_FLOAT32)
def test_float32(layout: str) -> None:
    """Three steps: sums of some hundred float32 values of order 1 in another order move by 1e-6, less than any gap
    between a chosen expert's score and another's, so that no choice can flip."""
    wanted = float32_alone()
    assert wanted.gap > 1e-4
    assert_equal(everyday(layout)["float32"][0], wanted, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "cp2ep2"])
def test_compiled(layout: str) -> None:
    """The compiler reorders float64 sums: two steps stay within 1e-9."""
    world, degrees = LAYOUTS[layout]
    words = [*DEEPSEEK, *SEQUENCE]
    found = launch(world, train, [*words, *degrees, "--compile.enable=true"], world, 2, seconds=280)[0]
    assert_equal(found, train(words, 1, 2))
