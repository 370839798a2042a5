"""The options of [model] that other people's architectures need: no layout changes the result."""

import pytest
import torch

from tests.helpers.layouts import LAYOUTS, SEQUENCE, alone, assert_equal, assert_every_token_seen
from tests.helpers.ranks import launch
from tests.helpers.steps import DEEPSEEK, gradients, train

OPTIONS = [
    *SEQUENCE,
    *DEEPSEEK,
    "--model.layers=4",
    "--model.qk_norm=projection",
    "--model.qkv_bias=true",
    "--model.rope_fraction=0.5",
    "--model.moe.dense_hidden_dim=20",
    "--model.moe.shared_gate=true",
]
PIPELINE = ["--parallelism.pp=2", "--training.microbatch_size=2"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "ep2", "tp2", "cp2", "ep2tp2", "cp2tp2"])
def test_five_steps(layout: str) -> None:
    world, degrees = LAYOUTS[layout]
    wanted = alone(*OPTIONS)
    results = launch(world, train, [*OPTIONS, *degrees], world)
    for found in results:
        assert_equal(found, wanted)
    assert_every_token_seen(results)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--activation_checkpoint.mode=full"], ["--optimizer.name=muon"]])
def test_recomputation_and_muon_on_tensor_parallel_ranks(words: list[str]) -> None:
    wanted = alone(*OPTIONS, *words[:1] if words and "muon" in words[0] else [])
    for found in launch(2, train, [*OPTIONS, *words, "--parallelism.tp=2"], 2):
        assert_equal(found, wanted)


@pytest.mark.slow
def test_pipeline_stages() -> None:
    results = launch(2, train, [*OPTIONS, *PIPELINE], 2)
    wanted = alone(*OPTIONS)
    for found in results:
        own = {name: wanted.parameters[name] for name in found.parameters}
        assert_equal(found, wanted._replace(parameters=own))
    assert set().union(*(found.parameters for found in results)) == wanted.parameters.keys()


@pytest.mark.parametrize("layout", ["tp2"])
def test_gradients_of_every_parameter(layout: str) -> None:
    """Also of biases, of the norms of whole projections, and of the shared experts' gate."""
    world, degrees = LAYOUTS[layout]
    wanted = gradients(OPTIONS, 1)
    for name in ("1.attention.wq.bias", "1.attention.k_norm.weight", "1.moe.shared_gate.weight"):
        assert wanted[f"layers.{name}"].norm() > 1e-6
    for found in launch(world, gradients, [*OPTIONS, *degrees], world):
        assert found.keys() == wanted.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)
