"""Pipeline parallelism, alone and with the others: five steps as on one process."""

import pytest
import torch

from tests.distributed.test_layouts import SEQUENCE, alone, assert_equal, assert_every_token_seen
from tests.helpers.ranks import launch
from tests.helpers.steps import DEEPSEEK, VANILLA, gradients, train

WORDS = [*SEQUENCE, "--model.layers=4", "--model.tie_embeddings=false"]
LAYOUTS = {
    "gpipe": (2, ["--parallelism.pp_schedule=GPipe", "--training.microbatch_size=2"]),
    "1f1b": (2, ["--training.microbatch_size=1"]),
    "interleaved": (2, ["--parallelism.pp_schedule=Interleaved1F1B", "--training.microbatch_size=2"]),
    "uneven": (2, ["--parallelism.pp_layers=[3,1]", "--training.microbatch_size=4"]),
    "one-micro-batch": (2, ["--parallelism.pp_schedule=GPipe"]),
    "ep2": (4, ["--parallelism.ep=2", "--training.microbatch_size=2"]),
    "tp2": (4, ["--parallelism.tp=2", "--training.microbatch_size=4"]),
    "cp2": (4, ["--parallelism.cp=2", "--training.microbatch_size=4"]),
    "four": (4, ["--training.microbatch_size=2"]),
    "dp2ep2": (8, ["--parallelism.ep=2", "--training.microbatch_size=1"]),
}


def degree(name: str) -> str:
    return f"--parallelism.pp={4 if name == 'four' else 2}"


def check(name: str, words: list[str]) -> None:
    world, layout = LAYOUTS[name]
    wanted = alone(*WORDS, *words)
    results = launch(world, train, [*WORDS, *words, degree(name), *layout], world, seconds=240)
    for found in results:
        # Every rank holds some of the parameters; together they are all of them.
        own = wanted.parameters.keys() & found.parameters.keys()
        assert own == found.parameters.keys()
        assert_equal(found, wanted._replace(parameters={key: wanted.parameters[key] for key in own}))
    assert set().union(*(found.parameters for found in results)) == wanted.parameters.keys()
    assert_every_token_seen(results)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "ep2"])
def test_deepseek_style(name: str) -> None:
    check(name, DEEPSEEK)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_vanilla(name: str) -> None:
    check(name, VANILLA)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--model.moe.first_dense_layers=2"],  # a stage without MoE layers
        ["--regularizers.cp.source=transition", "--regularizers.lb.scope=sequence"],
        ["--activation_checkpoint.mode=full"],
        ["--activation_checkpoint.mode=selective"],
        ["--regularizers.sp.method=sample", "--regularizers.cp.source=activated"],
    ],
)
def test_variants(words: list[str]) -> None:
    """One micro-batch where cp chooses its transitions over a micro-step."""
    check("one-micro-batch" if "transition" in words[0] else "1f1b", [*DEEPSEEK, *words])


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "ep2"])
def test_gradients_of_every_parameter(name: str) -> None:
    world, layout = LAYOUTS[name]
    wanted = gradients([*WORDS, *DEEPSEEK], 1)
    results = launch(world, gradients, [*WORDS, *DEEPSEEK, degree(name), *layout], world)
    for found in results:
        for parameter, grad in found.items():
            torch.testing.assert_close(grad, wanted[parameter], rtol=1e-9, atol=1e-12, msg=parameter)
    assert set().union(*results) == wanted.keys()


@pytest.mark.slow
def test_compiled() -> None:
    """The compiler reorders float64 sums: two steps stay within 1e-9."""
    world, layout = LAYOUTS["1f1b"]
    words = [*WORDS, *DEEPSEEK]
    compiled = [*words, degree("1f1b"), *layout, "--compile.enable=true"]
    wanted = train(words, 1, 2)
    for found in launch(world, train, compiled, world, 2, seconds=280):
        own = {key: wanted.parameters[key] for key in found.parameters}
        assert_equal(found, wanted._replace(parameters=own))
