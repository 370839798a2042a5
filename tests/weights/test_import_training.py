"""Training goes on from an import, with the terms that specialise experts, on one process and on two."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.byte_level import END, byte_level
from tests.helpers.other_models import save
from tests.helpers.rank_runs import EXACT, assert_same_rows, rows, run_train
from tests.helpers.runs import train
from tests.helpers.strangers import verb
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.errors import UserError

pytest.importorskip("transformers")

TERMS = [f"--regularizers.{name}.weight=0.01" for name in ("sp", "cp")]


def imported(name: str, folder: Path) -> Path:
    save(name, folder / "theirs")
    assert verb("import", str(folder / "theirs"), "--output", str(folder / name)) == 0
    return folder / name


@pytest.fixture
def options(tiny_options: list[str]) -> list[str]:
    """Options of a run of seconds, but for the model's."""
    return [*(word for word in tiny_options if not word.startswith(("--model.", "--tokenizer."))), *TERMS]


def config_of(folder: Path, options: list[str], *words: str) -> Config:
    return load_config(str(folder / "config.toml"), [*options, *words])


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_a_run_starts_from_the_import_with_its_tokenizer(name: str, options: list[str], tmp_path: Path) -> None:
    folder = imported(name, tmp_path)
    words = [f"--checkpoint.load_path={folder}", "--job.name=tuned", "--training.dtype=float32", "--training.steps=3"]
    found = [row for row in train(config_of(folder, options, *words)) if row["kind"] == "train"]
    assert [row["step"] for row in found] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["reg/sp"] > 0 for row in found)
    assert all("reg/cp" in row for row in found)
    assert (tmp_path / "runs" / "tuned" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_an_import_is_no_run_to_go_on_with(options: list[str], tmp_path: Path) -> None:
    folder = imported("mixtral", tmp_path)
    options = [word for word in options if not word.startswith("--job.output_dir")]
    with pytest.raises(UserError, match=r"has imported weights and is no run to go on with; start one from them by"):
        train(config_of(folder, options, "--training.dtype=float32"))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000000"]


def test_a_tokenizer_json_goes_with_the_run(options: list[str], tmp_path: Path) -> None:
    """The run keeps it, resumes with it, and an export has it."""
    tokenizers = pytest.importorskip("tokenizers")
    save("olmoe", tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").unlink()
    byte_level().save(str(tmp_path / "theirs" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"nothing says which symbol ends a document"):
        verb("import", str(tmp_path / "theirs"), "--output", str(tmp_path / "olmoe"))
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(f'{{"eos_token": "{END}"}}')
    verb("import", str(tmp_path / "theirs"), "--output", str(tmp_path / "olmoe"))
    words = [f"--checkpoint.load_path={tmp_path / 'olmoe'}", "--job.name=tuned", "--training.dtype=float32"]
    train(config_of(tmp_path / "olmoe", options, *words, "--training.steps=2"))
    found = train(config_of(tmp_path / "olmoe", options, *words, "--training.steps=4"))
    assert [row["step"] for row in found if row["kind"] == "train"] == [1, 2, 3, 4]
    run = tmp_path / "runs" / "tuned"
    assert (run / "tokenizer.json").read_bytes() == (tmp_path / "olmoe" / "tokenizer.json").read_bytes()
    assert not (run / "tokenizer.model").exists()
    assert verb("export", str(run), "--output", str(tmp_path / "back")) == 0
    text = "def f(x):\n\treturn x"
    here, there = (tokenizers.Tokenizer.from_file(str(tmp_path / one / "tokenizer.json")) for one in ("theirs", "back"))
    assert here.encode(text).ids == there.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_dense_import_is_upcycled(name: str, options: list[str], tmp_path: Path) -> None:
    """Without noise, and with gates that sum to 1, the new model has the loss of the dense one."""
    folder = imported(name, tmp_path)
    off = [f"--regularizers.{term}.weight=0" for term in ("sp", "cp")]
    shared = ["--training.dtype=float32", "--training.steps=1"]
    dense = train(config_of(folder, options, *off, *shared, f"--checkpoint.load_path={folder}", "--job.name=dense"))
    moe = ["first_dense_layers=0", "hidden_dim=48", "experts=4", "top_k=2", "normalize_topk=true"]
    words = [f"--checkpoint.upcycle_path={folder}", "--checkpoint.upcycle_noise=0", "--job.name=moe"]
    upcycled = train(config_of(folder, options, *shared, *words, *(f"--model.moe.{word}" for word in moe)))
    first: list[dict[str, Any]] = [rows[0] for rows in (dense, upcycled)]
    assert [row["kind"] for row in first] == ["validation"] * 2
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_moe", "ernie4_5_moe"])
def test_two_ranks_with_experts_spread_over_them_go_on_alike(name: str, options: list[str], tmp_path: Path) -> None:
    folder = imported(name, tmp_path)
    words = ["--config", str(folder / "config.toml"), *options, *EXACT, f"--checkpoint.load_path={folder}"]
    for ranks, layout in ((1, []), (2, ["--parallelism.ep=2"])):
        done = run_train(ranks, *words, *layout, "--training.steps=4", f"--job.name=ranks-{ranks}")
        assert done.returncode == 0, done.stderr
    assert_same_rows(*(rows(tmp_path / "runs" / f"ranks-{ranks}") for ranks in (2, 1)))
