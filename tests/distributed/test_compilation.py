"""Graphs of compiled blocks on two ranks, and where they break."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from tests.helpers.ranks import launch
from tests.helpers.steps import VOCABULARY, batch_of, config_of, mesh_of, rank_part
from titan_moe.optim import build_optimizer
from titan_moe.parallel.parallelize import build_runner
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step

pytestmark = pytest.mark.slow


def graphs(words: list[str], world: int) -> tuple[int, list[str]]:
    """Number of graphs of one training step, and Dynamo's reasons for graph breaks."""
    counter = CompileCounter()

    def compile_with_counter(module: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=counter)  # as nn.Module.compile

    config = config_of([*words, "--compile.enable=true"], world)
    mesh = mesh_of(config, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", compile_with_counter)
        model = build_model(config, VOCABULARY, mesh)
    runner, optimizer = build_runner(model, config, mesh), build_optimizer(model, config.optimizer)
    train_step(runner, optimizer, rank_part(batch_of(1), config, mesh), config, mesh, 1, {})
    return counter.frame_count, list(counters["graph_break"])


@pytest.mark.parametrize("mode", ["none", "full"])
def test_fsdp_breaks_no_graph(mode: str) -> None:
    """Three layers, all seven terms: the first layer's graph and that of the others."""
    assert launch(2, graphs, [f"--activation_checkpoint.mode={mode}"], 2) == [(2, []), (2, [])]


def test_expert_parallelism_breaks_graphs_only_where_ranks_exchange_rows() -> None:
    for count, reasons in launch(2, graphs, ["--parallelism.ep=2"], 2):
        assert count > 2
        assert reasons
        assert all("AllToAll." in reason or "gather_columns" in reason for reason in reasons)
