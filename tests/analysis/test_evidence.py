"""scripts/evidence.py: the cells of its sweeps, and a small sweep that stops and goes on with nothing but its rows."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.commands import ROOT
from titan_moe.analysis.sweep.rows import CellRow, measured, merge
from titan_moe.analysis.sweep.sweep import SweepState

SWEEP = f"""
config = "{ROOT}/train_configs/evidence.toml"
seeds = [0]
validations = 1
inspect = true
inspect_options = ["--sequences=2", "--cluster-tokens=16", "--examples=0"]
keep = 2
discard = true
[set]
checkpoint.upcycle_path = "{{dense}}"
[before.dense]
model.moe = {{ first_dense_layers = 12, top_k = 1 }}
regularizers = {{ measure = [], lb.weight = 0.0 }}
[arms.lb]
[arms."lb,sp,cp"]
regularizers = {{ sp.weight = 2e-3, cp.weight = 1e-3 }}
[grid.style]
bias = {{ balancer.rate = 1e-3 }}
"""
TOY = [
    "--model.dim=16",
    "--model.heads=2",
    "--model.vocab_size=512",
    "--model.moe.experts=4",
    "--model.moe.hidden_dim=16",
    "--training.steps=4",
    "--training.batch_size=4",
    "--training.seq_len=32",
    "--lr_scheduler.warmup_steps=1",
    "--tokenizer.path=",
    "--tokenizer.vocab_size=512",
    "--validation.sequences=4",
    "--validation.interval=2",
    "--checkpoint.interval=2",
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("evidence")
    sys.modules.pop("evidence", None)


def test_all_cells_have_a_configuration_and_pairs_come_early(script: ModuleType, tmp_path: Path) -> None:
    states = {name: SweepState(name, "", tmp_path, [], 1) for name in script.SWEEPS}
    counts = {name: len(state.cells) for name, state in states.items()}
    assert counts == {
        "evidence": 20,
        "evidence_upcycled": 25,
        "evidence_deepseek": 20,
        "evidence_upcycled_bias": 25,
        "evidence_more": 45,
        "evidence_upcycled_more": 50,
        "evidence_deepseek_more": 45,
        "evidence_upcycled_bias_more": 50,
    }
    order = [cell.name for cell in states["evidence"].order]
    assert order[:5] == ["lb--seed0", "lb,sp,cp--seed0", "lb,sp--seed0", "lb,cp--seed0", "lb--seed1"]
    config = states["evidence_deepseek"].configs["lb--seed0"]
    assert (config.model.moe.shared_experts, config.balancer.rate) == (1, 1e-3)


def test_the_baseline_of_the_other_arms_is_not_run_again(script: ModuleType, tmp_path: Path) -> None:
    first, more = (SweepState(name, "", tmp_path / name, [], 1) for name in ("evidence", "evidence_more"))
    assert first.keys["lb--seed0"] == more.keys["lb--seed0"]
    row = CellRow(key=first.keys["lb--seed0"], cell="lb--seed0", measured=measured(first.sweep), result={"loss": 4.0})
    (tmp_path / "rows" / "evidence").mkdir(parents=True)
    (tmp_path / "rows" / "evidence" / "lb--seed0.json").write_text(row.model_dump_json())
    script.share_baseline(tmp_path / "rows", "evidence_more", [cell.name for cell in more.cells if cell.arm == "lb"])
    assert merge(more.folder, [tmp_path / "rows" / "evidence_more"], more.keys, measured(more.sweep)) == 1
    more.open()
    assert [cell.name for cell in more.waiting()][:2] == ["lb,sp,cp_x10--seed0", "lb,sp,cp_x1,x10--seed0"]


def command(sweep: Path, folder: Path, corpus: Path, cache: Path, minutes: str) -> list[str]:
    script = [sys.executable, str(ROOT / "scripts" / "evidence.py"), f"--minutes={minutes}", f"--sweeps={sweep}"]
    places = [f"--rows={folder.parent / 'rows'}", f"--output={folder}", "--processes=2"]
    return [*script, *places, f"--data.corpus={corpus}", f"--data.cache_dir={cache}", *TOY]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_sweep_goes_on_elsewhere_with_its_rows_only(tmp_path: Path, corpus_dir: Path, cache_dir: Path) -> None:
    sweep = tmp_path / "small.toml"
    sweep.write_text(SWEEP)

    def run(folder: str, minutes: str) -> str:
        words = command(sweep, tmp_path / folder, corpus_dir, cache_dir, minutes)
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # SIGTERM while the first cell trains: its process saves, and there is no row yet.
    words = command(sweep, tmp_path / "one", corpus_dir, cache_dir, "9")
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        log = tmp_path / "one" / "small" / "logs" / "dense--bias--seed0.log"
        for _ in range(600):
            if log.exists() and "parameters" in log.read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert "small: 0 of 3 cells have rows, 0 of them new" in out

    assert "small: 3 of 3 cells have rows, 3 of them new" in run("one", "9")
    rows = {path.name: json.loads(path.read_text()) for path in (tmp_path / "rows" / "small").iterdir()}
    assert sorted(rows) == [f"{arm}--bias--seed0.json" for arm in ("dense", "lb,sp,cp", "lb")]
    assert "inspect/kappa" in rows["lb--bias--seed0.json"]["result"]
    tables = (tmp_path / "one" / "small" / "results.md").read_text()
    kept = [path.parent.name for path in (tmp_path / "one" / "small" / "runs").glob("*/checkpoints")]
    assert kept == ["dense--bias--seed0"]

    # Another machine has the rows and nothing else: it runs nothing and has the same tables.
    assert "small: 3 of 3 cells have rows, 0 of them new" in run("two", "9")
    assert not list((tmp_path / "two" / "small" / "runs").iterdir())
    assert (tmp_path / "two" / "small" / "results.md").read_text() == tables


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes=0"], "--minutes = '0': wants a positive number"),
        (["--minutes=5"], "there is no text; python scripts/evidence.py --text makes it"),
        (["--minutes=5", "--sweeps=nothing", "--data.corpus=docs"], "no sweep 'nothing'"),
        (["--minutes=5", "--data.corpus=docs", "--model.width=3"], "model.width"),
    ],
)
def test_mistakes_are_one_line(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_another_text_is_refused(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script.TEXT.mkdir(parents=True)
    (script.TEXT / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(script.UserError, match=r"python\.jsonl\.gz: is not the text of the rows"):
        script.check_text()
