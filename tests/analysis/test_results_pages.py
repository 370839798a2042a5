"""Results pages: tables and figures from row files, what they say while seeds are missing, and what stays without rows."""

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scipy import stats

from tests.helpers.commands import ROOT
from titan_moe.analysis.sweep.rows import FOLDER, CellRow, measured, write_row
from titan_moe.analysis.sweep.sweep import SweepState, run_sweep

ARMS = """
[arms.lb]
[arms."lb,sp"]
regularizers.sp.weight = 2e-3
[arms."lb,cp"]
regularizers.cp.weight = 1e-3
[arms."lb,erc"]
regularizers.erc.weight = 1.0
"""
SEEDS = 'config = "nano"\nseeds = [0, 1, 2, 3]\nlearning_rate = "tuned on lb"\n'
GRID = '[grid]\n"optimizer.lr" = [1e-3, 2e-3]\n'
PAGES = [ROOT / "docs" / name for name in ("results_tables.md", "results_copied.md", "results.md")]
MEASURES = ("moe/overlap", "moe/topk_mass", "moe/max_vio", "moe/dead", "reg/lb", "inspect/kappa")
MORE = ("inspect/persistence_top1", "inspect/domain_information", "inspect/knn_overlap", "inspect/cluster_agreement")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """scripts/results.py, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("results")
    yield lambda *words: module.main([*map(str, words)])
    for name in [name for name in sys.modules if name.startswith(("results", "draw_"))]:
        del sys.modules[name]


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for sweeps' directories, in place of runs/sweeps; the sweeps are called plain and grid."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "plain.toml").write_text(SEEDS + ARMS)
    (tmp_path / "files" / "grid.toml").write_text(SEEDS + ARMS + GRID)
    monkeypatch.setattr("titan_moe.analysis.sweep.grid.SWEEPS", tmp_path / "files")
    return tmp_path / "sweeps"


def made_up(number: int) -> float:
    """The measures of a cell."""
    return 0.1 + 0.001 * number + 0.01 * (number**2 % 11)


def make_rows(name: str, folder: Path, seeds: dict[str, int] | None = None) -> SweepState:
    """Rows of made-up numbers for the first seeds of every arm. seeds: how many, by arm; all without it."""
    state = SweepState(name, "", folder, [], 1)
    order = list(state.sweep.arms)
    for number, cell in enumerate(state.cells):
        seed = state.sweep.seeds.index(cell.seed)
        if seeds is None or seed < seeds.get(cell.arm, 0):
            loss = 4.0 + 0.01 * order.index(cell.arm) + 0.1 * seed + 0.002 * (number % 3)
            result = {"loss": loss, "perplexity": math.exp(loss)}
            result |= {measure: made_up(number) for measure in (*MEASURES, *MORE)}
            key = state.keys[cell.name]
            write_row(folder, CellRow(key=key, cell=cell.name, measured=measured(state.sweep), result=result))
    return state


def page(tmp_path: Path, *blocks: str) -> Path:
    """A page with empty tables."""
    path = tmp_path / "page.md"
    path.write_text("".join(f"<!-- {block} -->\n<!-- end -->\n" for block in blocks))
    return path


def test_kept_rows_give_the_tables_of_the_sweeps_own_directory(
    tmp_path: Path, sweeps: Path, results: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte; and the columns are those that the sweep itself writes."""
    make_rows("grid", sweeps / "grid")
    block, nothing = "sweep grid: arm; seeds; loss; difference to lb; verdict", tmp_path / "nothing"
    path = page(tmp_path, block)
    assert results("--evidence", nothing, "--sweeps", sweeps, "--pages", path) == 0
    from_directory = path.read_bytes()
    kept = ("--keep", sweeps / "grid", "--evidence", tmp_path / "evidence", "--sweeps", nothing)
    assert results(*kept, "--pages", page(tmp_path, block)) == 0
    assert "32 rows copied" in capsys.readouterr().out
    assert path.read_bytes() == from_directory
    assert run_sweep("grid", "", sweeps / "grid", [], 1, only_tables=True) == 0
    own = [line for line in (sweeps / "grid" / "results.md").read_text().splitlines() if line.startswith("|")]
    wanted = ["| " + " | ".join(cell.strip() for cell in line.strip("|").split("|")[:5]) + " |" for line in own]
    assert [line for line in path.read_text().splitlines() if line.startswith("|")] == wanted
    assert "### optimizer.lr 0.002" in path.read_text()
    assert "Learning rate: tuned on lb." in path.read_text()


def test_seeds_that_are_missing_and_arms_with_one(tmp_path: Path, sweeps: Path, results: Callable[..., int]) -> None:
    """Differences are over common seeds only; one seed is called so; what is missing is named."""
    state = make_rows("plain", sweeps / "plain", {"lb": 3, "lb,sp": 4, "lb,cp": 1})
    blocks = (
        "sweep plain: arm; seeds; loss; difference to lb; verdict",
        "differences plain: moe/overlap",
        "between plain: lb,cp; lb,erc; moe/overlap",
        "effects plain: lb,sp; lb,cp; lb,erc; |; loss",
        "tasks plain: acc",
    )
    path = page(tmp_path, *blocks)
    assert results("--sweeps", sweeps, "--evidence", tmp_path / "nothing", "--pages", path) == 0
    text = path.read_text()
    assert re.search(r"\| lb,cp \| 1 \| 4\.\d+ \| \+0\.\d+ \| one seed \|", text)
    assert re.search(r"\| lb,cp \| 1 \| \+0\.\d+ \(one seed\) \|", text)
    assert "8 of 16 runs are done. Differences are over the seeds that both arms have. No seed yet: lb,erc." in text
    values = {
        arm: [made_up(number) for number, cell in enumerate(state.cells) if cell.arm == arm] for arm in ("lb", "lb,sp")
    }
    test = stats.ttest_rel(values["lb,sp"][:3], values["lb"][:3])
    low, high = test.confidence_interval(0.95)
    mean = sum(b - a for a, b in zip(values["lb"][:3], values["lb,sp"][:3], strict=True)) / 3
    assert f"| lb,sp | 3 | {mean:+.4f} [{low:+.4f}, {high:+.4f}] |" in text
    assert "| overlap | 0 |  |  | no pair |" in text
    assert "| measure | lb (3 seeds) | lb,sp (4 seeds) | lb,cp (one seed) |" in text
    assert "Not measured yet" in text


def test_rows_of_other_settings_stop_the_command_and_without_rows_tables_stay(
    tmp_path: Path, sweeps: Path, results: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    state = make_rows("plain", sweeps / "plain", {"lb": 1})
    path = tmp_path / "page.md"
    path.write_text("<!-- sweep plain: arm; loss -->\nas it was\n<!-- end -->\n")
    options = ("--evidence", tmp_path / "nothing", "--pages", path)
    assert results("--sweeps", tmp_path / "nowhere", *options) == 0
    assert "as it was" in path.read_text()
    assert "stays as it is, without rows or checkpoints: sweep plain" in capsys.readouterr().err
    row = sweeps / "plain" / FOLDER / "lb--seed0.json"
    text = row.read_text()
    for changed, reason in (
        (text.replace(state.keys["lb--seed0"], "0" * 64), "was made with other settings than plain.toml has"),
        (text.replace('"validations": 3', '"validations": 4'), "was measured with another validations"),
    ):
        assert changed != text
        row.write_text(changed)
        assert results("--sweeps", sweeps, *options) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    assert "as it was" in path.read_text()
    for words, reason in (
        (("--keep", tmp_path, "--sweep", "plain"), "has no row of the sweep plain"),
        (("--keep", tmp_path, "--sweep", "plan"), "no sweep 'plan'"),
    ):
        assert results(*words, *options) == 2
        assert reason in capsys.readouterr().err
    path.write_text("<!-- curve plain: loss -->\n<!-- end -->\n")
    assert results(*options) == 2
    assert "there is no such table" in capsys.readouterr().err


def test_zero_shot_table(tmp_path: Path, sweeps: Path, results: Callable[..., int]) -> None:
    """Standard errors over seeds and over documents, chance, and the paired difference."""
    state = make_rows("plain", sweeps / "plain", {})
    accuracy = {"lb": [0.25, 0.3, 0.26], "lb,sp": [0.26, 0.33, 0.3]}
    for arm, values in accuracy.items():
        for seed, value in enumerate(values):
            tasks = {"eval/piqa/acc": value, "eval_error/piqa/acc": 0.03 + 0.01 * seed, "eval_chance/piqa/acc": 0.5}
            cell = f"{arm}--seed{seed}"
            result = {"loss": 4.0, "eval/piqa/bits_per_byte": 3.0 + seed, **tasks}
            row = CellRow(key=state.keys[cell], cell=cell, measured=measured(state.sweep), result=result)
            write_row(sweeps / "plain", row)
    path = page(tmp_path, "tasks plain: acc; bits_per_byte")
    assert results("--sweeps", sweeps, "--evidence", tmp_path / "nothing", "--pages", path) == 0
    error = stats.sem(accuracy["lb,sp"])
    low, high = stats.ttest_rel(accuracy["lb,sp"], accuracy["lb"]).confidence_interval(0.95)
    gap = sum(accuracy["lb,sp"]) / 3 - sum(accuracy["lb"]) / 3
    wanted = (
        f"| piqa | acc | lb,sp | 3 | 0.2967 | {error:.4f} | 0.0400 | 0.5000 | {gap:+.4f} [{low:+.4f}, {high:+.4f}] |"
    )
    assert wanted in path.read_text()
    assert "| piqa | bits_per_byte | lb | 3 | 4.0000 | 0.5774 |  |  |  |" in path.read_text()


def test_the_pages_tables_are_those_that_the_command_makes(tmp_path: Path, results: Callable[..., int]) -> None:
    """From the rows of the repository, and from the pages' own tables."""
    copies = [tmp_path / path.name for path in PAGES]
    for path, copy in zip(PAGES, copies, strict=True):
        copy.write_text(path.read_text())
    assert results("--sweeps", tmp_path / "nothing", "--pages", *copies) == 0
    for path, copy in zip(PAGES, copies, strict=True):
        assert copy.read_text() == path.read_text(), path.name


def test_numbers_read_from_tables_are_those_of_the_rows(
    tmp_path: Path, sweeps: Path, results: Callable[..., int]
) -> None:
    """To the digits of the tables. The baseline's mean is that of a table of two arms less the difference."""
    make_rows("plain", sweeps / "plain")
    path = page(
        tmp_path,
        "sweep plain: arm; seeds; loss; difference to lb",
        "differences plain: moe/overlap; inspect/kappa",
        "between plain: lb,sp; lb,cp; moe/overlap",
    )
    nothing = tmp_path / "nothing"
    assert results("--sweeps", sweeps, "--evidence", nothing, "--pages", path) == 0
    sources = importlib.import_module("results_sources")
    rows, read = sources.find_rows("plain", nothing, sweeps), sources.find_source("plain", nothing, nothing, [path])
    assert isinstance(read, sources.PageTables)
    assert read.arms() == rows.arms() == ["lb", "lb,sp", "lb,cp", "lb,erc"]
    for arm in rows.arms():
        assert read.seeds(arm) == rows.seeds(arm) == 4
        for measure in ("loss", "moe/overlap"):
            assert read.mean(arm, measure) == pytest.approx(rows.mean(arm, measure), rel=5e-4, abs=1.5e-4)
        for measure in ("loss", "moe/overlap", "inspect/kappa"):
            found, wanted = read.difference(arm, measure), rows.difference(arm, measure)
            assert (found is None) == (wanted is None) == (arm == "lb")
            assert found is None or found == pytest.approx(wanted, abs=5.1e-5)
    assert read.mean("lb", "inspect/kappa") is None
    assert read.difference("lb,cp", "loss").deviation == pytest.approx(stats.tstd(rows.gaps("lb,cp", "loss")), abs=2e-4)


@pytest.mark.usefixtures("results")
def test_seeds_that_a_difference_takes_agree_with_simulated_tests() -> None:
    """The table's second column: with so many seeds a t test finds the difference with the stated probability."""
    tables = importlib.import_module("results_tables")
    deviation, margin = 0.0084, 0.01
    seeds = int(tables.seeds_for(tables.powerful, deviation, margin))
    draws = stats.norm(margin, deviation).rvs((20_000, seeds), random_state=0)
    found = float((stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).mean())
    fewer = float((stats.ttest_1samp(draws[:, : seeds - 1], 0.0, axis=1).pvalue < 0.05).mean())
    power = tables.POWER
    error = (power * (1 - power) / 20_000) ** 0.5
    assert found > power - 4 * error
    assert fewer < power + 4 * error


@pytest.mark.slow
@pytest.mark.usefixtures("results")
def test_figures_are_drawn_from_rows_and_equal_numbers_give_equal_files(tmp_path: Path) -> None:
    make_rows(
        "nano_upcycled", tmp_path / "sweeps" / "nano_upcycled", {"lb": 2, "lb,sp": 2, "lb,cp": 1, "lb,entropy": 2}
    )
    draw = importlib.import_module("draw_results")
    for name in ("a", "b"):
        options = ("--evidence", tmp_path / "nothing", "--output", tmp_path / name)
        assert draw.main([*map(str, ("--sweeps", tmp_path / "sweeps", *options))]) == 0
    pictures = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert pictures == sorted(path.name for path in (ROOT / "docs" / "images" / "results").iterdir())
    for name in pictures:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
