"""Row files of a sweep's cells: keys, merged directories, the order of cells, and sweeps that go on elsewhere."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sweeps import SWEEP, finish, start_sweep
from titan_moe.analysis.sweep.rows import FOLDER, CellRow, measured, write_row
from titan_moe.analysis.sweep.sweep import Running, SweepState, run_sweep
from titan_moe.errors import UserError

TABLES = ("results.csv", "comparisons.csv", "results.md")


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(SWEEP.replace("seeds = [0, 1]", "seeds = [0, 1, 2]"))
    return path


def state_of(sweep_file: Path, folder: Path, *words: str) -> SweepState:
    return SweepState(str(sweep_file), "", folder, list(words), 1)


def write_rows(state: SweepState, parity: int | None = None) -> None:
    """Rows with made-up numbers, for all cells, or for those with an even or odd index."""
    for index, cell in enumerate(state.cells):
        if parity is None or index % 2 == parity:
            loss = 4.0 + 0.01 * index
            result = {"loss": loss, "perplexity": 50.0 + index}
            key = state.keys[cell.name]
            write_row(state.folder, CellRow(key=key, cell=cell.name, measured=measured(state.sweep), result=result))


def tables(sweep_file: Path, folder: Path, *sources: Path) -> dict[str, str]:
    assert run_sweep(str(sweep_file), "", folder, [], 1, only_tables=True, sources=sources) == 0
    return {name: (folder / name).read_text() for name in TABLES}


def test_merged_directories_give_the_tables_of_one(sweep_file: Path, tmp_path: Path) -> None:
    for name, parity in (("whole", None), ("a", 0), ("b", 1)):
        write_rows(state_of(sweep_file, tmp_path / name), parity)
    wanted = tables(sweep_file, tmp_path / "whole")
    assert "| lb,sp | 3 |" in wanted["results.md"]
    assert "Learning rate: of the configuration" in wanted["results.md"]
    assert tables(sweep_file, tmp_path / "merged", tmp_path / "a", tmp_path / "b" / FOLDER) == wanted
    assert tables(sweep_file, tmp_path / "a", tmp_path / "b", tmp_path / "whole") == wanted


def test_keys_know_settings_but_not_places_and_layouts(sweep_file: Path, tmp_path: Path) -> None:
    here = state_of(sweep_file, tmp_path / "here").keys
    assert len(set(here.values())) == len(here)
    elsewhere = ["--data.cache_dir=/else/where", "--parallelism.dp_replicate=1", "--metrics.interval=3"]
    assert state_of(sweep_file, tmp_path / "there", *elsewhere).keys == here
    changed = state_of(sweep_file, tmp_path / "here", "--optimizer.lr=1e-5").keys
    assert not {*changed.values()} & {*here.values()}
    # A change of the dense run changes the keys of the runs that start from it.
    sweep_file.write_text(sweep_file.read_text().replace("first_dense_layers = 3", "first_dense_layers = 2"))
    dense = state_of(sweep_file, tmp_path / "here").keys
    assert dense["lb--vanilla--seed0"] != here["lb--vanilla--seed0"]


def test_rows_of_other_settings_and_damaged_rows_are_one_line(sweep_file: Path, tmp_path: Path) -> None:
    state = state_of(sweep_file, tmp_path / "a")
    write_rows(state)
    with pytest.raises(UserError, match=r"--merge: .*cells/.*\.json: was made with other settings"):
        run_sweep(str(sweep_file), "", tmp_path / "b", ["--optimizer.lr=1e-5"], 1, True, sources=[tmp_path / "a"])
    with pytest.raises(UserError, match="was made with other settings; take another --output"):
        run_sweep(str(sweep_file), "", tmp_path / "a", ["--optimizer.lr=1e-5"], 1, True)
    with pytest.raises(UserError, match=r"--merge: .*has no row of this sweep"):
        run_sweep(str(sweep_file), "", tmp_path / "c", [], 1, True, sources=[tmp_path])
    path = tmp_path / "a" / FOLDER / "lb--vanilla--seed0.json"
    content = json.loads(path.read_text())
    for text in ("{", "[]", json.dumps(content | {"key": "x"}), json.dumps(content | {"result": {"loss": "low"}})):
        path.write_text(text)
        with pytest.raises(UserError, match=r"lb--vanilla--seed0\.json: is not a row of a sweep") as caught:
            run_sweep(str(sweep_file), "", tmp_path / "a", [], 1, True)
        assert "\n" not in str(caught.value)


def test_rows_with_other_measures_do_not_finish_a_cell_and_are_not_merged(sweep_file: Path, tmp_path: Path) -> None:
    write_rows(state_of(sweep_file, tmp_path / "a"))
    sweep_file.write_text(sweep_file.read_text().replace("validations = 2", 'validations = 1\neval = "piqa"'))
    state = state_of(sweep_file, tmp_path / "a")
    state.open()
    assert not state.results
    with pytest.raises(UserError, match=r"--merge: .*\.json: was measured with another validations, eval$"):
        run_sweep(str(sweep_file), "", tmp_path / "b", [], 1, True, sources=[tmp_path / "a"])


@pytest.mark.parametrize(("told", "status"), [(True, -signal.SIGTERM), (True, 1), (False, -signal.SIGTERM)])
def test_a_finished_cell_that_ends_by_the_signal_to_stop_has_not_failed(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool, status: int
) -> None:
    state = state_of(sweep_file, tmp_path / "a")
    state.open()
    end = f"raise SystemExit({status})" if status > 0 else f"import os; os.kill(os.getpid(), {-status})"
    process = subprocess.Popen([sys.executable, "-c", end])
    process.wait()
    state.running = [Running(state.cells[0], process, ["before"])]
    monkeypatch.setattr(state, "command", lambda _: None)
    monkeypatch.setattr("titan_moe.analysis.sweep.sweep.result_of", lambda *_: {"loss": 1.0})
    monkeypatch.setattr("titan_moe.analysis.sweep.sweep.write_tables", lambda *_: None)
    assert state.collect_ended(stopped=told)
    assert bool(state.failed) == (not told or status > 0)


def test_the_first_seed_of_all_arms_comes_first(sweep_file: Path, tmp_path: Path) -> None:
    state = state_of(sweep_file, tmp_path / "a")
    waiting = state.waiting()
    assert [cell.seed for cell in waiting] == [0] * 6 + [1] * 6 + [2] * 6
    assert {cell.arm for cell in waiting[:2]} == {"dense"}


def test_decided_arms_of_a_sequential_sweep_get_no_more_seeds(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("sequential = true\nseeds = [0,1,2,3,4,5,6,7,8,9]\n[arms.lb]\n[arms.worse]\n[arms.noisy]\n")
    state = state_of(file, tmp_path / "a")
    worse, noisy = [0.5, 0.51, 0.49] * 3, [0.5, -0.5, 0.1] * 3
    for seed in range(9):
        losses = {"lb": 4.0, "worse": 4.0 + worse[seed], "noisy": 4.0 + noisy[seed]}
        state.results |= {f"{arm}--seed{seed}": {"loss": loss} for arm, loss in losses.items()}
    assert [cell.name for cell in state.waiting()] == ["lb--seed9", "noisy--seed9"]
    state.results |= {f"noisy--seed{seed}": {"loss": 4.0 + worse[seed]} for seed in range(9)}
    assert state.waiting() == []
    assert state.finished()


def test_a_needed_run_whose_directory_is_elsewhere_runs_again(sweep_file: Path, tmp_path: Path) -> None:
    """Its row counts in the tables; unfinished cells start from its directory."""
    state = state_of(sweep_file, tmp_path / "a")
    state.results = {cell.name: {"loss": 4.0} for cell in state.cells if cell.name != "lb--vanilla--seed1"}
    assert [cell.name for cell in state.waiting()] == ["dense--vanilla--seed1", "lb--vanilla--seed1"]


@pytest.mark.slow
def test_a_sweep_stopped_after_a_cell_and_continued_elsewhere_gives_the_same_tables(
    sweep_file: Path, tmp_path: Path, corpus_dir: Path
) -> None:
    sweep_file.write_text(SWEEP.partition("[grid]")[0].replace("seeds = [0, 1]", "seeds = [0]"))
    finish(start_sweep(sweep_file, tmp_path / "whole", corpus_dir))
    # Stopped by its time limit after some cells, on one machine ...
    minutes, stops = 0.05, 0
    while not list((tmp_path / "one" / FOLDER).glob("*.json")):
        out = finish(start_sweep(sweep_file, tmp_path / "one", corpus_dir, "--minutes", str(minutes)))
        minutes, stops = 2 * minutes, stops + (f"--minutes={minutes:g} are over" in out)
    assert stops
    # ... and continued on another, which has its rows only.
    shutil.rmtree(tmp_path / "one" / "runs")
    finish(start_sweep(sweep_file, tmp_path / "two", corpus_dir, "--merge", str(tmp_path / "one")))
    for name in TABLES:
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "whole" / name).read_text(), name
