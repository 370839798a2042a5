"""A tiny model in a directory, and files of rows, for the tests of `titan-moe finetune`."""

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from tests.helpers import tiny_models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a qwen3_moe of 250,000 parameters and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.model().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_models.PAIRS * 8))
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_models.CHATS * 8))
    return path


@pytest.fixture
def words(tiny: Path, tmp_path: Path) -> list[str]:
    """Options that make a run of seconds, but for the rows."""
    (tmp_path / "tiny.toml").write_text("")
    return [
        "finetune",
        "--config",
        str(tmp_path / "tiny.toml"),
        f"--job.output_dir={tmp_path / 'runs'}",
        f"--model.path={tiny}",
        "--model.dtype=float32",
        "--data.seq_len=32",
        "--training.batch_size=4",
        "--training.microbatch_size=2",
        "--training.steps=6",
        "--optimizer.lr=1e-2",
        "--checkpoint.interval=2",
        "--checkpoint.keep=9",
        "--metrics.interval=1",
        "--metrics.tensorboard=false",
        "--regularizers.sp.weight=0.1",
        "--regularizers.cp.weight=0.05",
    ]
