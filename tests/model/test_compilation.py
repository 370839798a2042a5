"""torch.compile of the blocks: how many graphs there are, where they break, that the step stays the same, and the log line."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from tests.helpers.networks import assert_same_step, batch, config_with, network, settings, step
from titan_moe.config.tables import ActivationCheckpoint, Compile
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.compilation import CompileTime, compiles
from titan_moe.parallel.mesh import single
from titan_moe.parallel.parallelize import parallelize

LAYERS = 12
CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts the graphs that Dynamo gives to its back end, which runs them as they are."""
    counter = CompileCounter()

    def compile_with_counter(module: nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=counter)  # as nn.Module.compile

    monkeypatch.setattr(nn.Module, "compile", compile_with_counter)
    torch._dynamo.reset()
    counters.clear()
    yield counter
    torch._dynamo.reset()


def compiled(mode: str = "none", **options: Any) -> Transformer:
    model = network(torch.float32, model=settings().model_copy(update={"layers": LAYERS}), **options)
    tables = {"compile": Compile(enable=True), "activation_checkpoint": ActivationCheckpoint(mode=mode)}
    parallelize(model, config_with(**tables), single(CPU))
    return model


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        ("none", "exact"),
        pytest.param("none", "sample", marks=pytest.mark.slow),
        pytest.param("none", "sketch", marks=pytest.mark.slow),
        pytest.param("selective", "exact", marks=pytest.mark.slow),
        pytest.param("full", "sample", marks=pytest.mark.slow),
    ],
)
def test_equal_blocks_share_a_graph_without_breaks(mode: str, method: str, graphs: CompileCounter) -> None:
    """All seven terms, twelve layers. The first layer has a graph of its own (cp starts there); all others share one."""
    model, whole = compiled(mode, sp_method=method), batch()
    found = step(model, whole, len(whole.tokens))
    assert graphs.frame_count == 2
    assert not counters["graph_break"]
    plain = network(torch.float32, model=model.settings, sp_method=method)
    assert_same_step(found, step(plain, whole, len(whole.tokens)), 1e-5)


@pytest.mark.slow
def test_compilation_does_not_change_the_step() -> None:
    """By the real back end, on three layers that are recomputed."""
    plain, model, whole = network(torch.float32), network(torch.float32), batch()
    tables = {"compile": Compile(enable=True), "activation_checkpoint": ActivationCheckpoint(mode="full")}
    parallelize(model, config_with(**tables), single(CPU))
    micro = len(whole.tokens)
    assert_same_step(step(model, whole, micro), step(plain, whole, micro), 1e-5)


def test_auto_compiles_on_a_gpu() -> None:
    assert [compiles(Compile(), torch.device(kind)) for kind in ("cuda", "cpu")] == [True, False]
    assert [compiles(Compile(enable=True), torch.device(kind)) for kind in ("cuda", "cpu")] == [True, True]
    assert [compiles(Compile(enable=False), torch.device(kind)) for kind in ("cuda", "cpu")] == [False, False]


def test_the_log_says_how_long_compilation_took(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("titan_moe")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])  # other tests leave theirs
    time, double = CompileTime(), torch.compile(lambda x: x * 2, backend="eager")
    with caplog.at_level(logging.INFO, "titan_moe"):
        time.report()
        assert not caplog.messages
        double(torch.ones(3))
        time.report()
        time.report()
    assert len(caplog.messages) == 1, caplog.messages
    (line,) = caplog.messages
    assert line.startswith("torch.compile took ")
