"""A signal to one rank, or a bad gradient on one rank, with the step's numbers read by each rank: all ranks do the same."""

import signal
from typing import Any

import pytest
import torch

from tests.helpers.ranks import launch_each
from tests.helpers.steps import VOCABULARY, batch_of, config_of, mesh_of, rank_part, state, whole
from titan_moe.errors import TrainingError
from titan_moe.model.gemm import local
from titan_moe.optim import build_optimizer
from titan_moe.parallel.parallelize import build_runner
from titan_moe.runtime.stopping import Stopping
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step
from titan_moe.train.step_log import HostFacts, StepLog

LAYOUTS = {
    "dp2": [],
    "ep2": ["--parallelism.ep=2"],
    "tp2": ["--parallelism.tp=2"],
    "pp2": ["--parallelism.pp=2", "--model.tie_embeddings=false", "--training.microbatch_size=2"],
}


def steps_with(words: list[str], deferred: bool, bad: int, signalled: int) -> tuple[dict[str, Any], str, list[Any]]:
    """Three steps and a read. bad: step with a gradient on the last rank that is not a number; signalled: step before which it
    gets a signal. Parameters, the error, and after which steps this rank stops, for which signal."""
    config = config_of(words, 2)
    mesh = mesh_of(config, 2)
    model = build_model(config, VOCABULARY, mesh)
    runner = build_runner(model, config, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    stopping = Stopping(mesh.everyone, mesh.device)
    log = StepLog(model, optimizer, stopping, deferred=deferred)
    problem, stops = "", []
    with stopping.signals():
        for step in range(1, 4):
            if step == signalled and mesh.rank == 1:
                signal.raise_signal(signal.SIGUSR1)
            try:
                handle = spoil(model) if step == bad and mesh.rank == 1 else None
                train_step(runner, optimizer, rank_part(batch_of(step), config, mesh), config, mesh, step, {}, log)
                if handle is not None:
                    handle.remove()
                log.add(HostFacts(step, 1e-2, 0, 0.0, 0))
                if step == 3 or not deferred:
                    list(log.read())
            except TrainingError as error:
                problem = str(error)
                break
            stops.append((step, stopping.stop, stopping.signal if stopping.stop else None))
    return {name: whole(p) for name, p in state(model).items()}, problem, stops


def spoil(model: torch.nn.Module) -> Any:
    return next(model.parameters()).register_post_accumulate_grad_hook(lambda p: local(p.grad).fill_(float("nan")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_stop_for_a_signal_to_one(layout: str) -> None:
    words = LAYOUTS[layout]
    at_once, deferred = launch_each(2, steps_with, (words, False, 0, 2), (words, True, 0, 2))
    results = [stops for _, _, stops in at_once]
    wanted = [(1, False, None), (2, True, signal.SIGUSR1), (3, True, signal.SIGUSR1)]
    assert results == [wanted, wanted]
    for *_, stops in deferred:
        assert stops == [(1, False, None), (2, False, None), wanted[2]]  # with the read after step 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rank_updates_from_a_bad_gradient_of_one_on(layout: str) -> None:
    words = LAYOUTS[layout]
    results = launch_each(2, steps_with, (words, True, 2, 0), (words, False, 2, 0))
    for (ours, problem, _), (theirs, other, _) in zip(*results, strict=True):
        assert problem == other
        assert problem.startswith("step 2: grad_norm (gradient of ")
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
        assert all(bool(x.isfinite().all()) for x in ours.values() if x.is_floating_point())
