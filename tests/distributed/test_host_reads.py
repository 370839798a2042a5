"""How often the host waits for the device in a training step, per layout."""

from collections import Counter

import pytest
import torch

from tests.helpers.host_reads import HostReads, gpu_paths
from tests.helpers.layouts import assert_equal
from tests.helpers.ranks import launch
from tests.helpers.steps import DEEPSEEK, VOCABULARY, Outcome, batch_of, config_of, mesh_of, rank_part, train
from titan_moe.optim import build_optimizer
from titan_moe.parallel.parallelize import build_runner
from titan_moe.runtime.stopping import Stopping
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step
from titan_moe.train.step_log import StepLog

MICROBATCHES, MOE_LAYERS = 2, 3
SAMPLE = ["--regularizers.sp.method=sample", "--regularizers.sp.sample_fraction=0.4"]
METHODS = {"exact": [], "sample": SAMPLE}


def reads(words: list[str], world: int) -> Counter[str]:
    """In the second of two steps, as a GPU takes them: the numbers of a step stay on the device."""
    same_sequences = any(word.startswith(("--parallelism.cp", "--parallelism.tp")) for word in words)
    config = config_of([*words, f"--training.microbatch_size={4 if same_sequences else 4 // world}"], world)
    with pytest.MonkeyPatch.context() as patch:
        gpu_paths(patch)
        mesh = mesh_of(config, world)
        model = build_model(config, VOCABULARY, mesh)
        runner, optimizer = build_runner(model, config, mesh), build_optimizer(model, config.optimizer)
        log = StepLog(model, optimizer, Stopping(mesh.everyone, mesh.device), deferred=True)
        parts = rank_part(batch_of(1), config, mesh)
        assert len(parts) == MICROBATCHES
        train_step(runner, optimizer, parts, config, mesh, 1, {}, log)
        with HostReads() as counted:
            train_step(runner, optimizer, parts, config, mesh, 2, {}, log)
    return counted.seen


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_never_waits(method: str) -> None:
    words = [*METHODS[method], "--regularizers.o.variant=code", "--activation_checkpoint.mode=selective"]
    assert not reads(words, 1)


@pytest.mark.parametrize("method", METHODS)
def test_expert_parallelism_waits_once_per_layer(method: str) -> None:
    for found in launch(2, reads, [*METHODS[method], "--parallelism.ep=2"], 2):
        assert found == {"tolist": MICROBATCHES * MOE_LAYERS}


@pytest.mark.parametrize("layout", ["dp_shard", "tp", "cp"])
def test_other_parallelism_never_waits(layout: str) -> None:
    words = [*SAMPLE, *([] if layout == "dp_shard" else [f"--parallelism.{layout}=2"])]
    for found in launch(2, reads, words, 2):
        assert not found


def padded(words: list[str], world: int) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        gpu_paths(patch)
        return train(words, world, 3)


def test_samples_of_a_fixed_size_give_the_same_steps() -> None:
    """What a GPU computes with tokens of weight 0 beside the sample, and a CPU without them, on one rank and two."""
    words = [*DEEPSEEK, *SAMPLE]
    wanted = train(words, 1, 3)
    assert_equal(padded(words, 1), wanted)
    assert_equal(launch(2, padded, [*words, "--parallelism.ep=2"], 2)[0], wanted)


def test_the_counter_counts() -> None:
    x = torch.arange(4.0, requires_grad=True)
    with HostReads() as counted:
        x[x > 1].sum().backward()
        torch.tensor([1.0])
        x.detach().nonzero()
        float(x.sum())
    assert {"aten::index", "tensor", "aten::nonzero", "__float__"} <= set(counted.seen)
