"""The measures of an attached model are those of `titan-moe inspect`, and `titan-moe report` shows a run made with it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.moe_families import batch, build
from titan_moe.analysis.inspect.inspection import layer_measures
from titan_moe.analysis.inspect.tally import Recorder, Tally
from titan_moe.analysis.report.report import write_report
from titan_moe.analysis.report.runs import Run
from torchtitan_ext.adapters.transformers import RunDirectory, attach
from torchtitan_ext.terms import LayerView, Terms

pytest.importorskip("transformers", reason="the package transformers (extra hf) is not installed")


class KeepsRows(Recorder):
    """The recorder of `titan-moe inspect`, which wants activations and outputs with the token weights."""

    def per_token(self, view: LayerView, observed: Any) -> Any:  # noqa: ARG002
        return view.z_RF, view.y_RD, view.rows_TK

    def value(self, view: LayerView) -> torch.Tensor:
        z_RF, y_RD, rows_TK = view.observed
        return super().value(view._replace(z_RF=z_RF, y_RD=y_RD, rows_TK=rows_TK))


def batches() -> list[dict[str, Any]]:
    ids, labels = batch(4)
    return [{"input_ids": ids[rows], "labels": labels[rows]} for rows in (slice(0, 2), slice(2, 4))]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_measures_are_those_of_inspect(name: str) -> None:
    model = build(name)
    attached = attach(model, {"sp": 0.1})
    result = attached.inspect(batches(), step=7)
    assert result["step"] == 7

    recorder = KeepsRows()
    recorder.tally = Tally(
        layers=3,
        experts=8,
        domains=1,
        seq_len=12,
        device=torch.device("cpu"),
        domain_at=np.zeros_like,
        sampled=np.zeros(100, dtype=np.bool_),
        examples=0,
    )
    attached.terms = Terms([recorder])
    model.eval()
    with torch.no_grad():
        losses = []
        for one in batches():
            losses.append(model(**one, use_cache=False).loss)
    counts = [int((one["labels"][:, 1:] != -100).sum()) for one in batches()]
    mean = sum(float(loss) * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert result["loss"] == pytest.approx(mean, rel=1e-6)
    settings: Any = SimpleNamespace(
        settings=SimpleNamespace(moe=SimpleNamespace(top_k=3, hidden_dim=24, experts=8), dim=32)
    )
    for number, layer in enumerate(result["layers"]):
        wanted = layer_measures(recorder.tally, number, settings)
        for key, value in wanted.items():
            torch.testing.assert_close(torch.tensor(layer[key]), torch.tensor(value), rtol=1e-6, atol=1e-9, msg=key)
    assert [sum(layer["load"]) for layer in result["layers"]] == [3 * sum(counts)] * 3
    assert len(result["pairs"]) == 2
    assert all(0 < pair["kappa"] <= 1 for pair in result["pairs"])


def three_steps(folder: Path) -> list[torch.Tensor]:
    """A run directory of three training steps and an inspection; the batch."""
    model = build("qwen3_moe")
    attached = attach(model, {"sp": {"weight": 0.1, "warmup_steps": 2}, "v": 0.1})
    run = RunDirectory(folder, attached, steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, labels = batch()
    for step in range(1, 4):
        attached.step = step
        out = model(input_ids=ids, labels=labels, use_cache=False)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, tokens=step * ids.numel(), loss=out.loss.item(), lr=0.1)
    run.write_inspection(attached.inspect(batches(), step=3))
    return [ids, labels]


def test_a_run_directory_has_the_rows_that_the_report_reads(tmp_path: Path) -> None:
    ids, labels = three_steps(tmp_path / "tuned")
    run = Run(tmp_path / "tuned", "tuned")
    assert [row["step"] for row in run.rows("train")] == [1, 2, 3]
    plain = build("qwen3_moe")(input_ids=ids, labels=labels, use_cache=False).loss.item()
    # sp's weight is halved at the first of two warm-up steps.
    assert run.rows("train")[0]["ce"] == pytest.approx(plain, abs=1e-6)
    assert run.config.weights == {"sp": 0.1, "v": 0.1}
    assert run.newest["step"] == 3


@pytest.mark.slow
def test_report_shows_a_run(tmp_path: Path) -> None:
    three_steps(tmp_path / "tuned")
    page = write_report([tmp_path / "tuned"], tmp_path / "report").read_text()
    assert "sp 0.1, v 0.1" in page
    assert "3 of 3" in page


def test_a_run_goes_on_and_another_is_not_overwritten(tmp_path: Path) -> None:
    attached = attach(build("qwen3_moe"), {"sp": 0.1})
    attached.model(input_ids=batch()[0], labels=batch()[1], use_cache=False)
    run = RunDirectory(tmp_path, attached, steps=4)
    for step in (1, 2, 3):
        run.log(step, tokens=step, loss=1.0)
    with pytest.raises(FileExistsError, match="has a run already; choose another directory"):
        RunDirectory(tmp_path, attached, steps=4)
    RunDirectory(tmp_path, attached, steps=4, start=2).log(3, tokens=3, loss=2.0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]
