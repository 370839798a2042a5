"""`titan-moe finetune` as a user runs it: real processes on a tiny model."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.make_tiny_model import make_model
from tests.helpers.commands import environment, start, titan_moe, wait_for_step
from tests.helpers.tiny_models import tokenizer
from titan_moe.checkpoint.run_dir import read_rows
from titan_moe.cli import parse


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TITAN_MOE_CACHE", str(tmp_path / "cache"))


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == kind]


def train(*words: str) -> None:
    done = titan_moe(*words, timeout=900)
    assert done.returncode == 0, done.stderr


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in row.items() if name not in ("tokens_per_second", "step_seconds", "memory_gib")
    }


@pytest.mark.slow
def test_full_fine_tuning_and_resumption(words: list[str], pairs: Path, tmp_path: Path) -> None:
    """The loss falls; the model loads. A run stopped by SIGINT at any step goes on to the same rows and weights."""
    words = [*words, f"--data.train={pairs}", "--data.validation_fraction=0.25", "--validation.interval=10"]
    words += ["--training.steps=20", "--checkpoint.interval=5"]
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    train(*words, "--job.name=whole")
    history = rows(whole)
    assert [row["step"] for row in history] == [*range(1, 21)]
    assert history[-1]["ce"] < history[0]["ce"] - 0.5
    for row in history:
        terms = 1e-2 * row["reg/lb"] + 0.1 * row["reg/sp"] + 0.05 * row["reg/cp"]
        assert row["loss"] - row["ce"] == pytest.approx(terms, abs=1.5e-6)
    validations = rows(whole, "validation")
    assert [row["step"] for row in validations] == [10, 20]
    assert validations[1]["loss"] < validations[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(whole / "model").chat_template

    process = start(*words, "--job.name=parts")
    wait_for_step(parts, 3, process, seconds=600)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the same command goes on from there" in out
    assert not (parts / "model").exists()
    stopped = rows(parts)[-1]["step"]
    assert (parts / "checkpoints" / f"checkpoint-{stopped}" / "trainer_state.json").exists()
    train(*words, "--job.name=parts")
    assert [without_times(row) for row in rows(parts)] == [without_times(row) for row in history]
    again, once = (load_file(run / "model" / "model.safetensors") for run in (parts, whole))
    assert all(torch.equal(again[name], once[name]) for name in once)

    finished = titan_moe(*words, "--job.name=parts", timeout=900)
    assert finished.returncode == 0
    assert "is finished: 20 steps" in finished.stdout
    changed = titan_moe(*words, "--job.name=parts", "--data.seq_len=16", "--training.steps=30")
    assert changed.returncode == 2
    assert changed.stderr.splitlines()[-1].startswith("error: data.seq_len = 16: the run ")


@pytest.mark.slow
def test_adapters_on_chats_merge_and_two_arms_are_compared(words: list[str], chats: Path, tmp_path: Path) -> None:
    """Adapters and the merged model give the same logits; `report` compares a run with the terms to one without."""
    words = [*words, f"--data.train={chats}", "--lora.rank=4", "--lora.alpha=8"]
    train(*words, "--job.name=terms", "--lora.merge=true")
    none = [f"--regularizers.{name}.weight=0" for name in ("lb", "sp", "cp")]
    train(*words, "--job.name=none", *none, '--regularizers.measure=["lb","sp","cp"]')
    run, other = tmp_path / "runs" / "terms", tmp_path / "runs" / "none"
    assert rows(run)[-1]["ce"] < rows(run)[0]["ce"] - 0.2
    assert rows(other)[0]["loss"] == pytest.approx(rows(other)[0]["ce"], abs=1e-9)
    assert rows(other)[0]["ce"] == pytest.approx(
        rows(run)[0]["ce"], abs=2e-6
    )  # the terms do not change the forward pass
    import peft

    base = AutoModelForCausalLM.from_pretrained(words[4].partition("=")[2], dtype=torch.float32)
    ids = torch.arange(20, 44).view(2, 12)
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(base, str(run / "adapter"))(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-5)
    done = titan_moe("report", str(run), str(other), "--output", str(tmp_path / "page"), timeout=900)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page" / "index.html").read_text()
    assert "adapters of rank 4" in page
    assert "reg/sp" in (tmp_path / "page" / "differences.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("shard", [True, False], ids=["fsdp2", "ddp"])
def test_two_ranks_equal_one(shard: bool, words: list[str], pairs: Path, tmp_path: Path) -> None:
    """Sharded or replicated, the rows of metrics and the validation are those of one process."""
    words = [*words, f"--data.train={pairs}", "--data.validation_fraction=0.2", "--data.packing=none"]
    words += ["--training.microbatch_size=1", "--regularizers.lb.weight=0", "--training.steps=3"]
    train(*words, "--job.name=one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "titan_moe.cli"]
    command += [*words, "--job.name=two", f"--parallelism.shard={str(shard).lower()}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (read_rows(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        a, b = without_times(a), without_times(b)
        assert a.keys() == b.keys()
        for name in a.keys() - {"kind"}:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=2e-5), (a["step"], name)
    assert (tmp_path / "runs" / "two" / "model" / "model.safetensors").exists()


def broken(tiny: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the model whose config.json differs."""
    copy = folder / "broken"
    shutil.copytree(tiny, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_missing_inputs_are_one_line_before_anything_slow(words: list[str], pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        f"--data.train={tmp_path / 'no.jsonl'}": r"error: data\.train = '.*/no\.jsonl': can't be read: No such file",
        f"--model.path={tmp_path / 'empty'}": r"error: model\.path = '.*/empty': has no config\.json",
    }
    for word, message in cases.items():
        done = titan_moe(*words, f"--data.train={pairs}", word)
        assert done.returncode == 2
        assert re.fullmatch(message + ".*\n", done.stderr), done.stderr
        assert not (tmp_path / "runs").exists()
    unknown = titan_moe(*words, f"--data.train={pairs}", "--lora.rnk=3")
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "error: command line: unknown key lora.rnk; did you mean lora.rank?\n",
    )


@pytest.mark.slow
def test_models_that_do_not_fit_are_one_line(tiny: Path, words: list[str], pairs: Path, tmp_path: Path) -> None:
    """Transformers would fill layers that the files lack with random numbers, and only log it."""
    more = broken(tiny, tmp_path, num_hidden_layers=4)
    done = titan_moe(*words, f"--data.train={pairs}", f"--model.path={more}")
    assert done.returncode == 2
    assert re.search(r"^error: model\.path = '.*/broken': missing keys in its files", done.stderr, re.MULTILINE), (
        done.stderr
    )


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["finetune", "--help"])
    text = capsys.readouterr().out
    assert "--lora.rank=0  (int, >= 0)" in text
    assert "--regularizers.sp.weight=" in text
    assert "--training.deterministic" not in text


@pytest.mark.slow
def test_the_balancing_bias_moves_and_is_saved_with_adapters(words: list[str], pairs: Path, tmp_path: Path) -> None:
    """Every step moves each bias by the rate or not at all. Resumed, saved and merged, it is the same; one process would
    have the same bits."""
    make_model("glm4_moe").save_pretrained(tmp_path / "glm")
    tokenizer().save_pretrained(tmp_path / "glm")
    words = [*words, f"--data.train={pairs}", f"--model.path={tmp_path / 'glm'}", "--lora.rank=4", "--lora.merge=true"]
    words += ["--regularizers.lb.weight=0", "--balancer.rate=0.5", "--training.steps=3"]
    train(*words, "--job.name=parts")
    train(*words, "--job.name=parts", "--training.steps=6")
    run = tmp_path / "runs" / "parts"
    biases = load_file(run / "adapter" / "balancing_bias.safetensors")
    assert len(biases) == 2
    states = [
        json.loads((run / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").read_text()) for step in (3, 6)
    ]
    for name, bias in biases.items():
        kept = [
            torch.tensor(state["stateful_callbacks"]["Balancing"]["attributes"]["biases"][name]) for state in states
        ]
        assert torch.equal(kept[1], bias)
        assert all((values.abs() <= 0.5 * step).all() for step, values in zip((3, 6), kept, strict=True))
        assert torch.equal(bias * 2, (bias * 2).round())  # sums of steps of 1/2
        assert (kept[1] - kept[0]).abs().max() <= 1.5
        assert bias.abs().max() > 0
    merged = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(merged[name], bias) for name, bias in biases.items())
    refused = titan_moe(*words[:-1], "--job.name=qwen", f"--model.path={words[4].partition('=')[2]}")
    assert refused.returncode == 2
    assert "error: balancer.rate = 0.5: qwen3_moe has 0 balancing biases" in refused.stderr
