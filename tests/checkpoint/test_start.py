"""Upcycling: a dense checkpoint's layers become the experts of a new run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.runs import Make, train
from titan_moe.checkpoint.changes import check_unchanged
from titan_moe.checkpoint.run_dir import RunDir, newest_of
from titan_moe.checkpoint.start import start_from
from titan_moe.checkpoint.state import read_state
from titan_moe.errors import UserError
from titan_moe.model.moe import MoELayer
from titan_moe.parallel.mesh import single
from titan_moe.train.build import build_model

DENSE = ["--model.moe.first_dense_layers=3", "--model.moe.top_k=1", "--model.moe.hidden_dim=48"]
NO_TERMS = [f"--regularizers.{name}.weight=0" for name in ("lb", "z", "sp", "cp")]
UPCYCLED = ["--model.moe.hidden_dim=48", "--model.moe.normalize_topk=true"]


@pytest.fixture
def dense(tiny_config: Make) -> tuple[Path, float]:
    """A trained dense run, and its last validation loss."""
    config = tiny_config("--job.name=dense", *DENSE, *NO_TERMS)
    return RunDir(config).path, [r["loss"] for r in train(config) if r["kind"] == "validation"][-1]


def test_upcycling_without_noise_keeps_the_loss_of_the_dense_model(
    tiny_config: Make, dense: tuple[Path, float]
) -> None:
    path, loss = dense
    start = [f"--checkpoint.upcycle_path={path}", "--checkpoint.upcycle_noise=0"]
    rows = train(tiny_config("--job.name=moe", *UPCYCLED, *start))
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-5)  # equal experts, and gates that sum to 1
    first = next(r for r in rows if r["kind"] == "train")
    assert first["moe/overlap"] == pytest.approx(1.0, abs=1e-5)
    resumed = train(tiny_config("--job.name=moe", *UPCYCLED, *start, "--training.steps=8"))
    assert [r["step"] for r in resumed if r["kind"] == "train"] == list(range(1, 9))


def experts_of(moe: MoELayer) -> list[Tensor]:
    return [p.detach() for p in moe.experts.parameters()]


def test_upcycling_noise_differs_by_expert_and_has_the_given_size(tiny_config: Make, dense: tuple[Path, float]) -> None:
    config = tiny_config(*UPCYCLED, f"--checkpoint.upcycle_path={dense[0]}", "--checkpoint.upcycle_noise=0.1")
    one_rank = single(torch.device("cpu"))
    noisy, exact = build_model(config, 512, one_rank), build_model(config, 512, one_rank)
    fingerprint = read_state(newest_of(str(dense[0])), "").tokenizer
    start_from(noisy, config, fingerprint, one_rank)
    without = config.checkpoint.model_copy(update={"upcycle_noise": 0.0})
    start_from(exact, config.model_copy(update={"checkpoint": without}), fingerprint, one_rank)
    for ours, theirs in zip(noisy.moe_modules(), exact.moe_modules(), strict=True):
        assert torch.equal(ours.router.weight, theirs.router.weight)
        for a, b in zip(experts_of(ours), experts_of(theirs), strict=True):
            assert torch.equal(b[0], b[1])
            for expert in range(len(a)):  # std over thousands of values, drawn from a normal cut at 3 sigma
                assert (a[expert] - b[expert]).std() / b[expert].std() == pytest.approx(0.1, rel=0.1)
            assert (a[0] - a[1]).std() / b[0].std() == pytest.approx(0.1 * 2**0.5, rel=0.1)


def test_upcycling_refuses_other_shapes_and_sparse_models(tiny_config: Make, dense: tuple[Path, float]) -> None:
    start = f"--checkpoint.upcycle_path={dense[0]}"
    with pytest.raises(UserError, match=r"its layers are 48 wide; model\.moe\.hidden_dim must be 48"):
        train(tiny_config("--job.name=a", start, "--model.moe.hidden_dim=32"))
    with pytest.raises(UserError, match=r"another model: model\.dim differs"):
        train(tiny_config("--job.name=b", start, *UPCYCLED, "--model.dim=64"))
    moe = tiny_config("--job.name=sparse")
    train(moe)
    with pytest.raises(UserError, match="not a dense model"):
        train(tiny_config("--job.name=c", f"--checkpoint.upcycle_path={RunDir(moe).path}"))


def test_a_configuration_of_an_earlier_version_is_unchanged(tiny_config: Make, tmp_path: Path) -> None:
    """Before terms had tables of their own, weights of a user's terms stood in `custom`; optimizers had no options."""
    config = tiny_config()
    saved = config.model_dump(mode="json")
    saved["regularizers"]["custom"] = {}
    del saved["optimizer"]["muon"]
    check_unchanged(saved, config, tmp_path)
    saved["regularizers"]["custom"] = {"entropy": 1e-3}
    with pytest.raises(UserError, match=r"regularizers\.custom"):
        check_unchanged(saved, config, tmp_path)
