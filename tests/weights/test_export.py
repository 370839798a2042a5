"""`titan-moe export`: what it refuses, and that nothing half-written stays."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import environment, titan_moe
from tests.helpers.random_runs import (
    STEP,
    VARIANTS,
    WITHOUT_ARCHITECTURE,
    WITHOUT_GGUF,
    random_model,
    settings,
    write_run,
)
from tests.helpers.strangers import copied_run, edit_state, program, verb
from titan_moe.errors import UserError, pip_install

for package in ("safetensors", "tokenizers", "gguf"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that no test changes."""
    return write_run(tmp_path_factory.mktemp("exported"), random_model(settings({}), biased=False))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_a_step_and_a_checkpoint_give_the_same_files(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / f"step-{STEP:08d}"
    for name, words in {"run": [run], "step": [run, f"--step={STEP}"], "checkpoint": [checkpoint]}.items():
        assert verb("export", *map(str, words), "--output", str(tmp_path / name)) == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "step") == contents(tmp_path / "checkpoint")


def test_the_default_place_is_in_the_run_and_an_empty_directory_is_filled(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert verb("export", str(copy), "--dtype", "bfloat16") == 0
    assert (copy / "export" / f"step-{STEP:08d}-bfloat16" / "config.json").exists()
    (tmp_path / "empty").mkdir()
    assert verb("export", str(copy), "--output", str(tmp_path / "empty")) == 0
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_types_of_training_are_types_of_both_formats(
    form: str, dtype: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("export", str(run), "--format", form, "--dtype", dtype, "--output", str(tmp_path / "out")) == 0
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    assert capsys.readouterr().out.endswith(f" parameters in {dtype if form == 'hf' else short}\n")


def test_the_card_has_losses_tokens_and_no_path_of_this_machine(run: Path, tmp_path: Path) -> None:
    verb("export", str(run), "--output", str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (f"| tokens | {STEP * 32 * 64:,} |", "at step 20 | 5.2500 |", "[model.moe]", "in float32"):
        assert part in card
    for text in contents(tmp_path / "out").values():
        assert str(run.parent).encode() not in text
    stored = json.loads((tmp_path / "out" / "titan_moe.json").read_text())
    assert stored["model"] == json.loads(settings({}).model_dump_json())


def test_a_strangers_run_is_exported_without_its_modules_and_files(run: Path, tmp_path: Path) -> None:
    """What it names is neither imported nor read, and its words are no Markdown in the card."""
    module, marker = program(tmp_path)
    copy = copied_run(run, tmp_path)

    def change(state: dict[str, Any]) -> None:
        state["config"]["extensions"]["modules"] = [str(module)]
        state["config"]["data"]["corpus"] = "a|<script>\n# heading"
        state["config"]["tokenizer"]["path"] = "/dev/zero"

    edit_state(copy, change)
    assert verb("export", str(copy), "--output", str(tmp_path / "out")) == 0
    assert not marker.exists()
    assert "| text | a script heading |" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_written_through_a_link_in_a_strangers_run(run: Path, tmp_path: Path) -> None:
    copy = copied_run(run, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (copy / "export").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link, and nothing is written through one"):
        verb("export", str(copy))
    assert not list((tmp_path / "elsewhere").iterdir())


def damage(run: Path) -> str:
    """Cuts the last byte of a file of the checkpoint."""
    file = max(run.glob("checkpoints/*/__0_0.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    return "__0_0.distcp has"


def alter(run: Path) -> str:
    """Changes a byte."""
    file = max(run.glob("checkpoints/*/__0_0.distcp"))
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    return "__0_0.distcp is altered"


def lose_tokenizer(run: Path) -> str:
    (run / "tokenizer.model").unlink()
    return "its tokenizer is neither in the run directory nor in the cache"


def other_tokenizer(run: Path) -> str:
    (run / "tokenizer.model").write_bytes(b"other")
    return "not the tokenizer"


def lose_all(run: Path) -> str:
    shutil.rmtree(run / "checkpoints")
    return "neither a checkpoint nor a run directory with one"


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("break_run", [damage, alter, lose_tokenizer, other_tokenizer, lose_all])
def test_a_broken_run_is_one_line_and_leaves_nothing(
    break_run: Any, form: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TITAN_MOE_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    reason = break_run(copy)
    with pytest.raises(UserError, match=reason) as caught:
        verb("export", str(copy), "--format", form, "--output", str(tmp_path / "new" / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--format", "onnx"], "invalid choice: 'onnx'"),
        (["--dtype", "q8_0"], "--dtype = 'q8_0': --format hf has float32, bfloat16"),
        (["--format", "gguf", "--dtype", "int4"], "--format gguf has f32, f16, bf16, q8_0"),
        (["--step", "7"], "--step = 7: there is no .*step-00000007"),
        (["--output", "{full}"], "is a directory that is not empty; remove it or name another one"),
        (["--output", "{full}/file"], "exists already"),
        (["--output", "{full}/file/below"], "is a file; name a path below a directory"),
        (["--format", "gguf", "--output", "{full}"], "is a directory; name a file in it"),
        (["--format", "gguf", "--output", "{full}/file"], "exists already"),
        (["--output", "{full}/link"], "is a symbolic link"),
    ],
)
def test_a_wrong_option_is_one_line_and_changes_nothing(
    words: list[str], reason: str, run: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    (full / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        verb("export", str(run), *(word.format(full=full) for word in words))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert sorted(path.name for path in full.iterdir()) == ["file", "link"]
    assert (full / "file").read_text() == "mine"
    assert not (run / "export").exists()


@pytest.mark.parametrize("variant", WITHOUT_ARCHITECTURE)
def test_a_model_that_no_architecture_computes_is_refused_with_two_ways_out(variant: str, tmp_path: Path) -> None:
    options, biased = WITHOUT_ARCHITECTURE[variant]
    path = write_run(tmp_path, random_model(settings(options), biased))
    with pytest.raises(UserError, match=r"no architecture .* --format gguf.*--model\.moe\.score=sigmoid"):
        verb("export", str(path), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "form", "package"),
    [
        ("safetensors.torch", "hf", "safetensors"),
        ("tokenizers", "hf", "tokenizers"),
        ("gguf", "gguf", "gguf"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    module: str, form: str, package: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # Python then raises ImportError for it
    with pytest.raises(UserError) as caught:
        verb("export", str(run), "--format", form, "--output", str(tmp_path / "out"))
    remedy = f"{pip_install(package)} (or all of the extra {form})"
    assert str(caught.value) == f"package {package!r} is not installed: {remedy}"
    assert not list(tmp_path.iterdir())


def test_the_directory_where_one_is_may_be_the_target(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert verb("export", str(run), "--output", ".") == 0
    assert (tmp_path / "here" / "config.json").exists()
    with pytest.raises(UserError, match="is a directory that is not empty"):
        verb("export", str(run), "--output", str(tmp_path / "here"))


def test_a_float64_checkpoint_is_rounded_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    network = random_model(settings({}), biased=False, dtype=torch.float64)
    with torch.no_grad():
        network.embedding.mul_(1 + 2**-40)
    path = write_run(tmp_path, network, "float64")
    assert verb("export", str(path), "--output", str(tmp_path / "out")) == 0
    (first, *_) = sorted((tmp_path / "out").glob("*.safetensors"))
    (embedding,) = load_file(first).values()
    assert torch.equal(embedding, network.embedding.to(torch.float32))


def test_it_prints_the_architecture_and_a_mistake_is_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, biased = VARIANTS["shared, scaled, dense"]
    path = write_run(tmp_path, random_model(settings(options), biased))
    assert verb("export", str(path), "--output", str(tmp_path / "out")) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: qwen2_moe for Transformers, step 20, ")
    assert second == "model.moe.route_scale = 2.5 is multiplied into the experts' down projections"
    again = titan_moe("export", str(path), "--output", str(tmp_path / "out"))
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.count("\n") == 1
    assert "is a directory that is not empty" in again.stderr


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    command = [sys.executable, "-m", "titan_moe.cli", "export", str(run), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: --output = '{tmp_path / 'out'}': can't be written")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", WITHOUT_GGUF)
def test_gguf_refuses_options_that_it_does_not_have(variant: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, random_model(settings(WITHOUT_GGUF[variant][0]), biased=False))
    with pytest.raises(UserError, match=r"--format gguf: the file has no model\..*; use --format hf"):
        verb("export", str(run), "--format", "gguf", "--output", str(tmp_path / "out.gguf"))
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": "projection", "shared_experts": 1}, r"qk_norm = 'projection' with dense layers, shared experts"),
        ({"qk_norm": "projection", "head_dim": 24}, r"olmoe, has no model\.head_dim"),
        ({"rope_fraction": 0.5}, r"qwen2_moe, has no model\.rope_fraction below 1"),
        ({"qk_norm": True, "qkv_bias": True}, r"qwen3_moe, has no model\.qkv_bias"),
        (
            {"score": "sigmoid", "shared_experts": 1, "shared_gate": True},
            r"glm4_moe, has no model\.moe\.shared_gate",
        ),
    ],
)
def test_options_without_an_architecture_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, random_model(settings(options), biased=False))
    with pytest.raises(UserError, match=message):
        verb("export", str(run), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
