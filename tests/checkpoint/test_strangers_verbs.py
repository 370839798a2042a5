"""What files from elsewhere may not do in `generate`, `eval` and `import`. docs/security.md has the table."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.strangers import checkpoint_of, edit_state, program, sign, verb
from titan_moe.data.tokenizer import TOKENIZER_BYTES
from titan_moe.errors import UserError
from titan_moe.runtime.owner import remove


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of one's own to evaluate on."""
    path = tmp_path / "text.txt"
    path.write_text("a line of text\n" * 40)
    return path


def words_of(name: str, run: Path, text: Path) -> list[str]:
    options = ["--prompt=import", "--tokens=2"] if name == "generate" else [f"--text={text}"]
    return [name, str(run), *options]


VERBS = pytest.mark.parametrize("name", ["generate", "eval"])


def below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@VERBS
def test_modules_that_a_checkpoint_names_run_only_when_trusted(
    name: str, stranger: Path, text: Path, tmp_path: Path
) -> None:
    module, marker = program(tmp_path)
    edit_state(stranger, lambda state: state["config"]["extensions"].update(modules=[str(module)]))
    words = words_of(name, stranger, text)
    with pytest.raises(UserError, match=r"program\.py', and importing runs their code.*--trust"):
        verb(*words)
    assert not marker.exists()
    assert verb(*words, "--trust") == 0
    assert marker.exists()


@VERBS
def test_a_checkpoint_does_not_choose_the_files_that_are_read(
    name: str, stranger: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration names a tokenizer, a text, weights and a cache; the tokenizer is that in its directory."""
    private, planted = tmp_path / "private", tmp_path / "planted"
    private.write_text("a private line of text\n")

    def change(state: dict[str, Any]) -> None:
        state["config"]["data"].update(corpus=str(private), cache_dir=str(planted))
        state["config"]["tokenizer"].update(path=str(private))
        state["config"]["checkpoint"].update(load_path=str(private), expert_order=str(private))

    edit_state(stranger, change)
    assert verb(*words_of(name, stranger, text)) == 0
    assert not planted.exists()
    (stranger / "tokenizer.model").unlink()
    monkeypatch.setenv("TITAN_MOE_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"its tokenizer is neither in the run directory nor in the cache"):
        verb(*words_of(name, stranger, text))
    assert not planted.exists()


def test_generate_writes_nothing(stranger: Path, text: Path, tmp_path: Path) -> None:
    before = below(tmp_path)
    assert verb(*words_of("generate", stranger, text)) == 0
    assert below(tmp_path) == before


@pytest.mark.parametrize("link", ["eval", "eval/step-00000004-text.json"])
def test_eval_writes_through_no_symbolic_link(stranger: Path, text: Path, tmp_path: Path, link: str) -> None:
    target = tmp_path / "target"
    target.mkdir() if link == "eval" else target.write_text("mine")
    (stranger / link).parent.mkdir(exist_ok=True)
    (stranger / link).symlink_to(target)
    if link == "eval":
        with pytest.raises(UserError, match="is a symbolic link, and nothing is written through one"):
            verb(*words_of("eval", stranger, text))
        assert not list(target.iterdir())
    else:
        assert verb(*words_of("eval", stranger, text)) == 0
        assert target.read_text() == "mine"
        assert not (stranger / link).is_symlink()


@VERBS
def test_a_large_model_with_small_files_is_refused_before_memory_is_asked_for(
    name: str, stranger: Path, text: Path
) -> None:
    edit_state(stranger, lambda state: state["config"]["model"].update(dim=1 << 16, heads=1 << 8))
    with pytest.raises(UserError, match=r"declares a model of at least [\d,]+ bytes, but its files have"):
        verb(*words_of(name, stranger, text))


@VERBS
@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_files_of_a_checkpoint_that_are_not_regular_are_refused(
    name: str, kind: str, stranger: Path, text: Path, tmp_path: Path
) -> None:
    path = checkpoint_of(stranger) / "state.json"
    shutil.move(path, tmp_path / "elsewhere")
    os.mkfifo(path) if kind == "fifo" else path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"regular file|symbolic link|neither a checkpoint"):
        verb(*words_of(name, stranger, text))


def another(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def linked(path: Path) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


def huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(TOKENIZER_BYTES + 1)


TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another": (another, "not the tokenizer that the run's checkpoints were trained with"),
    "a FIFO": (fifo, "can't be read: Not a regular file"),
    "a link": (linked, "can't be read: Too many levels of symbolic links"),
    "too large": (huge, "can't be read: More than"),
}


@VERBS
@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_tokenizer_of_a_run_is_a_regular_file_with_its_fingerprint(
    name: str, damage: str, stranger: Path, text: Path
) -> None:
    change, message = TOKENIZERS[damage]
    change(stranger / "tokenizer.model")
    with pytest.raises(UserError, match=message):
        verb(*words_of(name, stranger, text))


@VERBS
@pytest.mark.parametrize("content", [b"", b"rank 1", b'{"model": 1}', b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_tokenizer_is_one_line(name: str, content: bytes, stranger: Path, text: Path) -> None:
    """With a fingerprint that agrees, as whoever makes the run can do."""
    import hashlib

    (stranger / "tokenizer.model").write_bytes(content)
    edit_state(stranger, lambda state: state.update(tokenizer=hashlib.sha256(content).hexdigest()))
    with pytest.raises(UserError, match=r"tokenizer\.model") as caught:
        verb(*words_of(name, stranger, text))
    assert "\n" not in str(caught.value)


def test_text_to_evaluate_is_only_read(stranger: Path, text: Path, tmp_path: Path) -> None:
    """A folder with a FIFO, a device's name, a link to a folder, rows that are no rows, and a Python program."""
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copyfile(text, folder / "text.txt")
    os.mkfifo(folder / "fifo.txt")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder)
    (folder / "rows.jsonl").write_text("[" * 100_000 + "\n" + '{"text": 1}\n')
    marker = tmp_path / "it-ran"
    (folder / "conftest.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    assert verb(*words_of("eval", stranger, folder)) == 0
    assert not marker.exists()


def test_altered_weights_and_a_program_in_the_metadata_are_refused(stranger: Path, text: Path) -> None:
    path = checkpoint_of(stranger) / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    for name in ("generate", "eval"):
        with pytest.raises(UserError, match=r"is damaged: __0_0\.distcp is altered"):
            verb(*words_of(name, stranger, text))
    (checkpoint_of(stranger) / ".metadata").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    sign(checkpoint_of(stranger))
    for name in ("generate", "eval"):
        with pytest.raises(UserError, match=r"the metadata names os\.system, which is not part of a checkpoint"):
            verb(*words_of(name, stranger, text))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tests.helpers.other_models import save

    folder = tmp_path_factory.mktemp("theirs")
    save("mixtral", folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_import_reads_no_fifo(name: str, other_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "theirs"
    shutil.copytree(other_model, copy)
    fifo(copy / name)
    with pytest.raises(UserError, match=name) as caught:
        verb("import", str(copy), "--output", str(tmp_path / "ours"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("damage", ["too large", "another"])
def test_import_reads_tokenizers_with_bounds(damage: str, other_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "theirs"
    shutil.copytree(other_model, copy)
    huge(copy / "tokenizer.model") if damage == "too large" else (copy / "tokenizer.model").write_bytes(b"{" * 100_000)
    with pytest.raises(UserError, match=r"tokenizer\.model") as caught:
        verb("import", str(copy), "--output", str(tmp_path / "ours"))
    assert "\n" not in str(caught.value)


def test_import_writes_only_into_its_output(other_model: Path, tmp_path: Path) -> None:
    """Not through a link that has the output's name."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").touch()
    (tmp_path / "ours").symlink_to(target)
    before = below(other_model)
    with pytest.raises(UserError, match=r"is a directory that is not empty|symbolic link"):
        verb("import", str(other_model), "--output", str(tmp_path / "ours"))
    assert [path.name for path in target.iterdir()] == ["mine"]
    remove(tmp_path / "ours")
    assert verb("import", str(other_model), "--output", str(tmp_path / "ours")) == 0
    assert below(other_model) == before
