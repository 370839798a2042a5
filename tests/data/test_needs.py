"""What is missing for a configuration is listed at once; tokenizers by name."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, environment
from tests.helpers.strangers import verb
from titan_moe.config.load import load_config
from titan_moe.data.needs import check_needs
from titan_moe.data.streams import tokens_needed
from titan_moe.errors import UserError
from titan_moe.verbs import prepare, train


def test_everything_that_is_missing_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's configuration in a new checkout, without `datasets` and a tracker's package."""
    monkeypatch.chdir(tmp_path)
    for name in ("datasets", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # as `import` sees a package that is not there
    config = load_config("medium", ['--metrics.trackers=["wandb"]'])
    with pytest.raises(UserError) as found:
        check_needs(config, has_tokenizer=False)
    first, *lines = str(found.value).splitlines()
    assert first == "3 things are missing:"
    for line, word, remedy in zip(
        lines,
        ("data.corpus", "wandb", "tokenizer.path"),
        ("-m pip install datasets", "-m pip install wandb", "scripts/get_tokenizer.py open-32k"),
        strict=True,
    ):
        assert word in line
        assert remedy in line
    with pytest.raises(UserError, match=r"^2 things"):
        check_needs(config, has_tokenizer=True)


def test_train_and_prepare_say_it_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import ArgumentParser

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for module in (train, prepare):
        parser = ArgumentParser()
        module.add_arguments(parser)
        arguments = parser.parse_args(["--config", "medium"])
        arguments.overrides = []
        with pytest.raises(UserError, match=r"^2 things are missing"):
            module.run(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("config", "extras"), [("medium", "hf"), ("debug", "")])
def test_train_prints_the_extras_of_a_configuration_and_does_nothing_else(
    config: str, extras: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verb("train", "--config", config, "--extras") == 0
    assert capsys.readouterr().out == f"{extras}\n"
    assert not list(tmp_path.iterdir())


def test_of_a_stream_as_much_is_needed_as_the_run_reads_up_to_whole_groups() -> None:
    """Groups of 8,192 windows; the last label is one token behind the last window."""
    steps, batch, length, group = 28610, 512, 2048, 1 << 24
    needed = tokens_needed(steps - 1, batch, length, group)
    assert 0 < needed - 1 - steps * batch * length < group
    assert (needed - 1) % group == 0
    assert tokens_needed(0, batch, length, group) == tokens_needed(15, batch, length, group) == group + 1
    assert tokens_needed(16, batch, length, group) == 2 * group + 1


def get_tokenizer(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "get_tokenizer.py", *words]
    return subprocess.run(
        command, env=environment() | variables, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_an_open_tokenizer_of_32000_pieces_by_name(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokenizer.model"
    done = get_tokenizer("open-32k", "--out", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("32,000 pieces; use it with --tokenizer.path=")
    options = ["--config", "medium", f"--tokenizer.path={path}", "--data.corpus=stdlib"]
    options += ["--data.tokens=10000", f"--data.cache_dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "titan_moe.cli", "prepare", *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert "32,000 pieces" in done.stdout


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    done = get_tokenizer("llama-2", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: llama-2: meta-llama/Llama-2-7b-hf can't be read")
    assert done.stderr.count("\n") == 1
