"""Steps whose numbers stay on the device until they are read together: the same rows and parameters as with a read per
step."""

from typing import Any

import pytest
import torch

from tests.helpers.runs import DEEPSEEK, Make, rows, untimed
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.tables import Config
from titan_moe.data.prepare import prepare
from titan_moe.errors import TrainingError
from titan_moe.parallel.mesh import single
from titan_moe.train.step_log import StepLog
from titan_moe.train.trainer import Trainer
from titan_moe.train.watch import Spikes

MANY = ["--metrics.interval=4", "--training.steps=10", "--validation.interval=7", "--checkpoint.interval=0"]
DEFERRED = pytest.mark.parametrize("deferred", [False, True], ids=["immediate", "deferred"])


def trainer_of(config: Config, deferred: bool) -> Trainer:
    trainer = Trainer(config, prepare(config), RunDir(config), single(torch.device("cpu")))
    trainer.steps = StepLog(trainer.model, trainer.optimizer, trainer.stopping, Spikes(0.0), deferred)
    return trainer


def run(trainer: Trainer) -> list[dict[str, Any]]:
    trainer.run_dir.open()
    try:
        trainer.run()
    finally:
        trainer.run_dir.close()
    return untimed(rows(trainer.run_dir))


def tensors(trainer: Trainer) -> list[torch.Tensor]:
    """Parameters, balancing biases and the optimizer's state."""
    state = [x for slots in trainer.optimizer.state.values() for x in slots.values()]
    return [x.detach().clone() for x in (*trainer.model.state_dict().values(), *state)]


@pytest.mark.parametrize("style", [[], [*DEEPSEEK, "--balancer.center=true"]], ids=["", "deepseek"])
def test_deferred_reads_give_the_same_run(tiny_config: Make, style: list[str]) -> None:
    immediate, deferred = (
        trainer_of(tiny_config(f"--job.name=run{number}", *MANY, *style), bool(number)) for number in range(2)
    )
    assert run(immediate) == run(deferred)
    assert all(torch.equal(a, b) for a, b in zip(tensors(immediate), tensors(deferred), strict=True))
    assert list(immediate.steps.spikes.norms) == list(deferred.steps.spikes.norms)


@DEFERRED
def test_nothing_is_updated_from_a_bad_gradient_on(tiny_config: Make, deferred: bool) -> None:
    """One step's gradient is not a number; those of the steps after it, which run until the next read, are finite
    again."""
    bad, name = 6, "layers.1.moe.router.weight"
    words = [*MANY, *DEEPSEEK, "--lr_scheduler.decay=none"]
    trainer = trainer_of(tiny_config(*words), deferred)
    wanted = trainer_of(tiny_config("--job.name=short", *words, f"--training.steps={bad - 1}"), False)
    wanted_rows = [row for row in run(wanted) if row["kind"] == "train"]
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("nan") if len(calls) == bad else gradient

    trainer.model.get_parameter(name).register_hook(spoil)
    with pytest.raises(
        TrainingError, match=rf"^step {bad}: grad_norm \(gradient of {name}\) is not finite; nothing was"
    ):
        run(trainer)
    assert len(calls) == (7 if deferred else bad)  # 7: the validation's read
    assert [row for row in untimed(rows(trainer.run_dir)) if row["kind"] == "train"] == wanted_rows
    assert all(torch.equal(a, b) for a, b in zip(tensors(trainer), tensors(wanted), strict=True))


@DEFERRED
def test_a_term_that_is_not_finite_is_named(tiny_config: Make, deferred: bool) -> None:
    trainer = trainer_of(tiny_config(), deferred)
    with torch.no_grad():
        trainer.model.layers["1"].moe.router.weight.fill_(1e30)
    with pytest.raises(
        TrainingError, match="step 1: reg/z is not finite; nothing was updated, there is no checkpoint yet"
    ):
        run(trainer)
