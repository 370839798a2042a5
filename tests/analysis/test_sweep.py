"""Sweeps: the cells of a grid, the statistics, and real sweeps that are killed and restarted."""

import csv
import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.helpers.sweeps import SWEEP, finish, start_sweep
from titan_moe.analysis.evaluate.results import write_results
from titan_moe.analysis.sweep.grid import SWEEPS, cell_config, cells_of, read_sweep
from titan_moe.analysis.sweep.statistics import holm, paired
from titan_moe.analysis.sweep.tables import evaluated, result_of, verdict, write_tables
from titan_moe.errors import UserError


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(SWEEP)
    return path


def test_a_sweep_has_a_cell_for_every_arm_grid_point_and_seed(sweep_file: Path) -> None:
    path, sweep = read_sweep(str(sweep_file))
    cells = cells_of(path, sweep)
    assert len(cells) == 2 * 2 * 3
    assert [cell.arm for cell in cells[:4]] == ["dense"] * 4
    assert {cell.name for cell in cells} >= {"lb,sp--biased--seed1", "dense--vanilla--seed0"}
    chosen = {cell.name: cell for cell in cells}["lb,sp--biased--seed1"]
    assert chosen.needs == ("dense--biased--seed1",)
    config = cell_config(chosen, sweep, Path("out"), ["--training.steps=7"], 1)
    assert config.checkpoint.upcycle_path == "out/dense--biased--seed1"
    assert (config.job.seed, config.job.name, config.job.output_dir) == (1, "lb,sp--biased--seed1", "out")
    assert (config.regularizers.sp.weight, config.balancer.rate, config.training.steps) == (0.5, 1e-2, 7)
    dense = cell_config(cells[0], sweep, Path("out"), [], 1)
    assert dense.checkpoint.upcycle_path == ""
    assert dense.model.moe.first_dense_layers == 3


INVALID = {
    "[arms]": r"arms: .*at least 1",
    "[arms.a]\n[arrms.b]": r"arrms: extra inputs .*; a sweep has .*baseline",
    'baseline = "b"\n[arms.a]': r"baseline = 'b' is none of the arms: a",
    "[arms.a]\n[grid]\nmodel.moe.top_k = [1]": r'grid\.model: put the whole key in quotes: "model\.key"',
    '[arms.a]\n[grid]\n"model.dim" = []': r"grid\.model\.dim: has no value",
    "[arms.a]\n[before.a]": r"before\.a: an arm has that name",
    '[arms."a b"]\n[arms.a_b]': r"two cells have the name a_b--seed0",
    "[arms": r"not valid TOML",
}


@pytest.mark.parametrize("text", list(INVALID))
def test_an_invalid_sweep_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=INVALID[text]) as caught:
        cells_of(*read_sweep(str(tmp_path / "bad.toml")))
    assert "\n" not in str(caught.value)


def test_an_invalid_setting_of_an_arm_names_file_and_arm(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[arms.a]\n[arms.b]\nmodel.dimm = 3")
    path, sweep = read_sweep(str(tmp_path / "bad.toml"))
    good, bad = cells_of(path, sweep)
    cell_config(good, sweep, tmp_path, [], 1)
    with pytest.raises(UserError, match=r"bad\.toml: arms\.b: unknown key model\.dimm; did you mean model\.dim"):
        cell_config(bad, sweep, tmp_path, [], 1)


def test_a_grid_value_may_replace_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        "[arms.a]\n[set]\nmodel.layers = 2\n[grid]\nscale = { x = { config = 'small.toml' } }"
    )
    (tmp_path / "more.toml").write_text("extends = 'base.toml'\nconfig = 'mine.toml'\n[arms.b]\n[grid]\nscale.y = {}")
    (tmp_path / "mine.toml").write_text("extends = 'debug.toml'\nmodel.dim = 96")
    path, sweep = read_sweep(str(tmp_path / "more.toml"))
    result = {cell.name: cell_config(cell, sweep, tmp_path, [], 1) for cell in cells_of(path, sweep)}
    assert {name: (config.model.dim, config.model.layers) for name, config in result.items()} == {
        f"{arm}--{scale}--seed0": (dim, 2) for arm in "ab" for scale, dim in (("x", 576), ("y", 96))
    }
    path, sweep = read_sweep(str(tmp_path / "more.toml"), base="medium")
    assert {cell.config for cell in cells_of(path, sweep)} == {"small.toml", "medium"}


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.toml")), ids=lambda file: file.stem)
def test_all_cells_of_the_shipped_sweeps_are_valid(file: Path) -> None:
    path, sweep = read_sweep(file.stem)
    for cell in cells_of(path, sweep):
        cell_config(cell, sweep, Path("runs"), [], 1)


def test_paired_tests_equal_those_of_scipy() -> None:
    values = [0.1, 0.3, -0.05, 0.2, 0.15]
    result = paired(values, margin=0.05)
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(0.95)
    assert (result.p, result.low, result.high) == pytest.approx((test.pvalue, interval.low, interval.high), rel=1e-12)
    below = stats.ttest_1samp(values, 0.05, alternative="less").pvalue
    above = stats.ttest_1samp(values, -0.05, alternative="greater").pvalue
    assert result.p_equivalent == pytest.approx(max(below, above), rel=1e-12)
    assert np.isnan(paired([0.1], 0.05).p)
    assert paired([0.0, 0.0], 0.05)[1:] == (0.0, 0.0, 0.0, 1.0, 0.0)


def test_holm_adjusted_p_values() -> None:
    assert holm([0.01, 0.04, float("nan"), 0.03]) == pytest.approx([0.03, 0.06, float("nan"), 0.06], nan_ok=True)
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([-0.10, -0.11, -0.12], "lower"),
        ([0.10, 0.11, 0.12], "higher"),
        ([0.0001, -0.0001, 0.0002, 0.0], "no difference"),
        ([0.1, -0.1, 0.05], "cannot tell"),
        ([0.1], "one seed"),
    ],
)
def test_verdict_on_paired_losses(values: list[float], word: str) -> None:
    result = paired(values, 0.005)
    assert verdict(result, result.p) == word


def finished_cell(folder: Path, cell: str, loss: float, accuracy: float) -> dict[str, float]:
    """The numbers of a run directory with metrics and a result of `eval` for its last step."""
    run = folder / cell
    run.mkdir()
    rows = [{"kind": "train", "step": 4, "tokens": 9, "ce": loss}]
    rows += [{"kind": "validation", "step": 4, "loss": loss, "perplexity": 2.0, "bits_per_byte": 1.0}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for step, value in ((2, 0.9), (4, accuracy)):
        found = {"task": "piqa", "measure": "acc", "value": value, "standard_error": 0.1, "chance": 0.5, "documents": 5}
        write_results(run / "checkpoints" / f"step-{step:08d}", "piqa", "tasks", [found], {"step": step})
    return result_of(run, 1)


def test_results_on_tasks_are_compared_over_seeds(tmp_path: Path) -> None:
    """A row per arm and measure: mean and deviation over seeds, the paired difference with its interval."""
    (tmp_path / "mine.toml").write_text('seeds = [0, 1, 2]\neval = "piqa"\n[arms.lb]\n[arms.sp]\n')
    path, sweep = read_sweep(str(tmp_path / "mine.toml"))
    cells = cells_of(path, sweep)
    accuracy = {"lb": (0.5, 0.6, 0.7), "sp": (0.6, 0.8, 0.8)}
    results = {cell.name: finished_cell(tmp_path, cell.name, 3.0, accuracy[cell.arm][cell.seed]) for cell in cells}
    write_tables(tmp_path, sweep, cells, results)
    test = stats.ttest_rel(accuracy["sp"], accuracy["lb"]).confidence_interval(0.95)
    text = (tmp_path / "results.md").read_text()
    assert "| piqa | acc | lb | 3 | 0.6 ± 0.1 |  |" in text
    assert f"| piqa | acc | sp | 3 | 0.7333 ± 0.12 | +0.1333 [{test.low:+.4f}, {test.high:+.4f}] |" in text
    rows = {(row["arm"], row["measure"]): row for row in csv.DictReader((tmp_path / "comparisons.csv").open())}
    assert float(rows["sp", "eval/piqa/acc"]["low"]) == pytest.approx(test.low)
    assert not any(measure.startswith("eval_") for _, measure in rows)
    assert results[cells[0].name]["eval_error/piqa/acc"] == 0.1
    assert results[cells[0].name]["eval_chance/piqa/acc"] == 0.5
    assert evaluated(tmp_path / cells[0].name, 4, "piqa").exists()


@pytest.mark.slow
def test_a_sweep_killed_at_random_times_ends_with_the_same_tables(
    sweep_file: Path, tmp_path: Path, corpus_dir: Path
) -> None:
    sweep_file.write_text(SWEEP.partition("[grid]")[0].replace("seeds = [0, 1]", "seeds = [0]"))
    out = finish(start_sweep(sweep_file, tmp_path / "whole", corpus_dir))
    assert "3 of 3 runs" in out
    rows = list(csv.DictReader((tmp_path / "whole" / "results.csv").open()))
    assert len(rows) == 3
    assert {row["arm"] for row in rows} == {"dense", "lb", "lb,sp"}
    text = (tmp_path / "whole" / "results.md").read_text()
    assert "| lb,sp | 1 |" in text
    assert " kappa |" in text
    measures = {row["measure"] for row in csv.DictReader((tmp_path / "whole" / "comparisons.csv").open())}
    assert {"loss", "moe/overlap", "reg/lb", "inspect/kappa", "inspect/persistence_top1"} <= measures

    random_times = random.Random(1)
    for number in signal.SIGKILL, signal.SIGTERM, signal.SIGKILL:
        process = start_sweep(sweep_file, tmp_path / "broken", corpus_dir)
        time.sleep(random_times.uniform(4, 10))
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode in (-9, 143, 0)
    finish(start_sweep(sweep_file, tmp_path / "broken", corpus_dir))
    for name in ("results.csv", "comparisons.csv", "results.md"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "whole" / name).read_text(), name

    began = time.monotonic()
    finish(start_sweep(sweep_file, tmp_path / "whole", corpus_dir))
    assert time.monotonic() - began < 60
    changed = start_sweep(sweep_file, tmp_path / "whole", corpus_dir, "--optimizer.lr=1e-5")
    _, errors = changed.communicate(timeout=120)
    assert changed.returncode == 2
    assert "optimizer.lr: has changed since dense--seed0 was run" in errors


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path: Path, corpus_dir: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("validations = 1\n[arms.good]\n[arms.bad]\ncheckpoint.load_path = '/nowhere'\n")
    process = start_sweep(file, tmp_path / "out", corpus_dir)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "1 of 2 runs" in out
    assert "failed: bad--seed0: status 2: error: checkpoint.load_path = '/nowhere': " in errors


@pytest.mark.slow
def test_a_sweep_runs_tasks_on_the_last_checkpoint_of_every_cell(tmp_path: Path, corpus_dir: Path) -> None:
    """Also on cells that had finished before the sweep asked for tasks."""
    pytest.importorskip("lm_eval")
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    documents = [{"goal": f"import {n}", "sol1": "write it", "sol2": "read it", "label": n % 2} for n in range(3)]
    lines = "".join(f"{json.dumps(document)}\n" for document in documents)
    (tmp_path / "data" / "piqa" / "validation.jsonl").write_text(lines)
    file = tmp_path / "mine.toml"
    file.write_text("validations = 1\n[arms.lb]\n[arms.z]\nregularizers.z.weight = 0.1\n")
    finish(start_sweep(file, tmp_path / "out", corpus_dir))
    assert "piqa" not in (tmp_path / "out" / "results.md").read_text()
    options = f'eval = "piqa"\neval_options = ["--data={tmp_path / "data"}", "--limit=2"]\n'
    file.write_text(options + file.read_text())
    finish(start_sweep(file, tmp_path / "out", corpus_dir))
    assert "| piqa | acc | z | 1 |" in (tmp_path / "out" / "results.md").read_text()
    measures = {row["measure"] for row in csv.DictReader((tmp_path / "out" / "comparisons.csv").open())}
    assert {"loss", "eval/piqa/acc_norm", "eval/piqa/bits_per_byte"} <= measures
