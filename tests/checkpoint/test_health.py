"""Weights that blow up: what is saved, and from which checkpoint the same command goes on."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import titan_moe
from tests.helpers.runs import Make, rows, train
from titan_moe.checkpoint import health
from titan_moe.checkpoint.health import check_finite
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.tables import Config
from titan_moe.errors import NonFiniteError, TrainingError

WORDS = ["--checkpoint.interval=1", "--validation.interval=0", "--lr_scheduler.decay=none", "--training.steps=8"]
WORDS += ["--lr_scheduler.warmup_steps=0"]


def failure(config: Config) -> str:
    with pytest.raises(TrainingError) as caught:
        train(config)
    return str(caught.value)


def steps(config: Config) -> list[int]:
    return RunDir(config).saved_steps()


def asides(config: Config) -> list[str]:
    return sorted(path.name for path in RunDir(config).checkpoints.glob("aside-*"))


@pytest.mark.parametrize("lr", ["1e38", "1e300"])
@pytest.mark.parametrize("keep", [1, 3])
def test_a_run_whose_weights_blew_up_can_go_on(tiny_config: Make, lr: str, keep: int) -> None:
    """Four good steps; then a learning rate by which the weights overflow (1e300), or only the next gradients (1e38)."""
    words = [*WORDS, f"--checkpoint.keep={keep}"]
    train(tiny_config(*words, "--training.steps=4"))
    config = tiny_config(*words, f"--optimizer.lr={lr}")
    for _ in range(3):
        message = failure(config)
        assert "not saved, the last good checkpoint" in message or "no finite step follows from" in message
        assert steps(config)[-1] == 4
    config = tiny_config(*words)  # a sane learning rate goes on
    assert train(config)[-1]["step"] == 8
    assert len(steps(config)) == keep


def test_a_background_save_is_held_back_too(tiny_config: Make) -> None:
    config = tiny_config(*WORDS, "--optimizer.lr=1e38", "--checkpoint.async_save=true")
    assert "it was not saved, there is no checkpoint yet" in failure(config)
    assert not steps(config)


def test_a_validation_that_is_not_finite_is_one_line(tiny_options: list[str]) -> None:
    words = ["--optimizer.lr=1e300", "--training.steps=1", "--lr_scheduler.warmup_steps=0", "--job.name=lr"]
    done: subprocess.CompletedProcess[str] = titan_moe("train", *tiny_options, *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: validation after step 1: the cross-entropy is not finite, there is no checkpoint yet"
    )


@pytest.fixture
def overflowing(tmp_path: Path) -> tuple[str, Path]:
    """An extension whose term has an infinite gradient from a step on, and the file that says from which one."""
    path, step = tmp_path / "overflow.py", tmp_path / "step"
    path.write_text(
        f"""
from pathlib import Path
import torch
from titan_moe.extend import Term, register

@register
class Overflow(Term):
    name = "overflow"
    def value(self, view):
        x = view.logits_TE.sum() * 0
        late = view.tokens.step >= int(Path({str(step)!r}).read_text())
        return torch.where(late, (x + 1e-45).sqrt() * 1e38 * 1e-16, x)
"""
    )
    return f'--extensions.modules=["{path}"]', step


def test_a_run_goes_back_one_checkpoint_and_no_further(tiny_config: Make, overflowing: tuple[str, Path]) -> None:
    """The gradient of step 5 overflows in every run; that of step 4 too if the run goes on from step 3."""
    extension, at = overflowing
    at.write_text("5")
    config = tiny_config(extension, "--regularizers.overflow.weight=1.0", *WORDS)
    message = failure(config)
    assert re.match(r"step 5: grad_norm.* is not finite; nothing was updated, no finite step follows from", message)
    assert "goes on from" in message
    assert steps(config) == [1, 2, 3]
    assert asides(config) == ["aside-step-00000004-1"]
    at.write_text("4")
    for _ in range(2):
        assert "step-00000003, which stays, since going back to it did not help" in failure(config)
        assert steps(config) == [1, 2, 3]
        assert asides(config) == ["aside-step-00000004-1"]
    at.write_text("7")  # the run gets further, and fails there
    assert "goes on from" in failure(config)
    assert asides(config) == ["aside-step-00000004-1", "aside-step-00000006-1"]
    at.write_text("100")
    assert train(config)[-1]["step"] == 8


def test_the_only_checkpoint_is_never_renamed(tiny_config: Make, overflowing: tuple[str, Path]) -> None:
    extension, at = overflowing
    at.write_text("2")
    config = tiny_config(extension, "--regularizers.overflow.weight=1.0", *WORDS, "--checkpoint.keep=1")
    for _ in range(2):
        assert "which stays, since it is the only checkpoint" in failure(config)
        assert steps(config) == [1]
        assert not asides(config)
    assert rows(RunDir(config))[-1]["step"] == 1


def test_the_checkpoint_before_stays_until_a_finite_step_follows_from_the_newest(
    tiny_config: Make, overflowing: tuple[str, Path]
) -> None:
    extension, at = overflowing
    at.write_text("5")
    words = [extension, "--regularizers.overflow.weight=1.0", *WORDS, "--checkpoint.keep=1"]
    for saving in ("false", "true"):
        config = tiny_config(*words, f"--checkpoint.async_save={saving}", f"--job.name={saving}")
        assert "goes on from" in failure(config)
        assert steps(config)[-1] == 3
        assert saving == "true" or steps(config) == [3]  # a background save may be as slow as the next step
    at.write_text("100")
    assert train(config)[-1]["step"] == 8
    assert steps(config) == [8]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_every_tensor_and_loss_is_looked_at(bad: float) -> None:
    good: dict[str, Any] = {"a": torch.ones(3), "empty": torch.ones(0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    check_finite(3, good, {"ce": 1.0}, None)
    for name in ("a", "b"):
        tensors = {key: x.clone() for key, x in good.items()}
        tensors[name].view(-1)[-1] = bad
        with pytest.raises(NonFiniteError, match=f"^step 3: {name} is not finite"):
            check_finite(3, tensors, {"ce": 1.0}, None)
    with pytest.raises(NonFiniteError, match="lb of a forward pass"):
        check_finite(3, good, {"ce": 1.0, "lb": bad}, None)


def test_other_renamed_checkpoints_do_not_count(tmp_path: Path) -> None:
    for name, reason in (("aside-step-00000004-1", health.REASON), ("aside-step-00000009-1", "it is damaged")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "REASON").write_text(f"{reason}\n")
    run_dir = RunDir.__new__(RunDir)
    run_dir.checkpoints = tmp_path
    assert health._renamed(run_dir) == [4]
