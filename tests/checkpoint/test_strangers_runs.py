"""What a run directory, checkpoint or configuration from elsewhere may not do: run code, read files, write elsewhere, take
memory. docs/security.md has the table; the tests are named in it."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.helpers.commands import TINY
from tests.helpers.runs import train
from tests.helpers.strangers import (
    checkpoint_of,
    edit_config,
    edit_state,
    program,
    sign,
    verb,
)
from titan_moe.checkpoint.dcp import check_storage
from titan_moe.checkpoint.parts import PartReader
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import load_config
from titan_moe.errors import UserError

SMALL = ["--sequences=2", "--cluster-tokens=0", "--examples=1"]
READERS = [["inspect", *SMALL], ["place", "--ranks=2", "--sequences=4"]]


@pytest.mark.parametrize("words", READERS, ids=["inspect", "place"])
def test_modules_that_a_checkpoint_names_are_imported_only_when_trusted(
    stranger: Path, tmp_path: Path, words: list[str]
) -> None:
    module, marker = program(tmp_path)
    edit_state(stranger, lambda state: state["config"]["extensions"].update(modules=[str(module)]))
    with pytest.raises(UserError, match=r"program\.py', and importing runs their code.*--trust"):
        verb(*words, str(stranger))
    assert not marker.exists()
    assert verb(*words, "--trust", str(stranger)) == 0
    assert marker.exists()


@pytest.mark.parametrize("words", [["plan"], ["prepare"], ["train", "--check"]], ids=["plan", "prepare", "train"])
def test_modules_that_a_configuration_names_are_imported_only_when_trusted(
    stranger: Path, tmp_path: Path, words: list[str]
) -> None:
    module, marker = program(tmp_path)
    config = edit_config(stranger, "modules = ", f"modules = [{str(module)!r}]")
    elsewhere = tmp_path / "mine.toml"
    shutil.copyfile(config, elsewhere)
    for path in (config, elsewhere):
        with pytest.raises(UserError, match="--trust"):
            verb(*words, "--config", str(path))
        assert not marker.exists()
    verb("plan", "--trust", "--config", str(config))
    assert marker.exists()


def test_a_checkpoint_does_not_choose_the_files_that_inspect_reads_or_where_it_writes(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("a private line of text\n" * 400)
    planted = tmp_path / "planted"

    def change(state: dict) -> None:  # type: ignore[type-arg]
        state["config"]["data"].update(corpus=str(private), cache_dir=str(planted))
        state["config"]["tokenizer"].update(path=str(private / "key"))

    edit_state(stranger, change)
    assert verb("inspect", *SMALL, str(stranger)) == 0  # on the text of the run, which the cache has
    assert "private" not in next((stranger / "inspect").iterdir()).read_text()
    monkeypatch.setenv("TITAN_MOE_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"data\.corpus = .*private.* is not in the cache.*--trust"):
        verb("inspect", *SMALL, str(stranger))
    assert not planted.exists()


@pytest.mark.parametrize("words", [["prepare"], ["train", "--check"]], ids=["prepare", "train"])
def test_a_stored_configuration_does_not_choose_the_files_that_are_read(
    stranger: Path, tmp_path: Path, words: list[str]
) -> None:
    edit_config(stranger, "corpus = ", f"corpus = {str(tmp_path)!r}")
    with pytest.raises(UserError, match=r"names files: data\.corpus = .*--trust.*--data\.corpus="):
        verb(*words, "--config", str(stranger / "config.toml"))


def test_a_users_own_runs_need_no_trust_wherever_they_are_and_without_their_text(
    tmp_path: Path, corpus_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is moved, its text deleted, the working directory another one."""
    monkeypatch.setenv("TITAN_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus_dir, tmp_path / "text")
    words = [*TINY, "--data.corpus=text", "--job.output_dir=runs", "--training.steps=4"]
    train(load_config("debug", [*words, "--metrics.tensorboard=false"]))
    before = (Path("runs/debug/metrics.jsonl")).read_text()
    shutil.move("runs", "elsewhere")
    shutil.rmtree("text")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert verb("inspect", *SMALL, str(tmp_path / "elsewhere/debug")) == 0
    config = load_config(str(tmp_path / "elsewhere/debug/config.toml"), ["--training.steps=6"])
    rows = train(config)
    assert [json.loads(line) for line in before.splitlines()] == rows[: len(before.splitlines())]
    assert rows[-1]["step"] == 6
    assert RunDir(config).path == tmp_path / "elsewhere/debug"


def test_a_run_does_not_go_on_with_its_text_where_another_one_is_named_that_does_not_exist(
    run: Path, cache_dir: Path, tmp_path: Path
) -> None:
    words = [*TINY, f"--data.cache_dir={cache_dir}", f"--job.output_dir={run.parent}", "--training.steps=6"]
    with pytest.raises(UserError, match=r"data\.corpus = '.*/nowhere': neither a corpus .* nor a file or folder"):
        verb("train", *words, f"--data.corpus={tmp_path}/nowhere")


@pytest.mark.parametrize("link", ["inspect", "inspect/step-00000004.json"])
def test_inspect_writes_through_no_symbolic_link(stranger: Path, tmp_path: Path, link: str) -> None:
    target = tmp_path / "target"
    target.mkdir() if link == "inspect" else target.write_text("mine")
    (stranger / link).parent.mkdir(exist_ok=True)
    (stranger / link).symlink_to(target)
    if link == "inspect":
        with pytest.raises(UserError, match="is a symbolic link, and nothing is written through one"):
            verb("inspect", *SMALL, str(stranger))
        assert not list(target.iterdir())
    else:
        assert verb("inspect", *SMALL, str(stranger)) == 0
        assert target.read_text() == "mine"
        assert not (stranger / link).is_symlink()


def test_report_writes_through_no_symbolic_link(stranger: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (stranger / "report").mkdir()
    for name in ("index.html", "loss.png", "loss.csv"):
        (stranger / "report" / name).symlink_to(target)
    assert verb("report", str(stranger)) == 0
    assert target.read_text() == "mine"
    shutil.rmtree(stranger / "report")
    (stranger / "report").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a symbolic link"):
        verb("report", str(stranger))


@pytest.mark.parametrize("link", ["metrics.jsonl", "logs", "logs/rank-0.log", "checkpoints", "tensorboard"])
def test_train_writes_through_no_symbolic_link(run: Path, stranger: Path, tmp_path: Path, link: str) -> None:
    target = tmp_path / "target"
    moved = stranger / link
    if link == "logs/rank-0.log":
        moved.parent.mkdir()
    if moved.exists():
        shutil.move(moved, target)
    elif link == "logs/rank-0.log":
        target.write_text("mine")
    else:
        target.mkdir()
    before = target.read_bytes() if target.is_file() else sorted(target.rglob("*"))
    moved.symlink_to(target)
    config = load_config(
        str(run / "config.toml"), [f"--job.output_dir={stranger.parent}", "--training.steps=6"], trust=True
    )
    with pytest.raises(UserError, match="is a symbolic link, and nothing is written through one"):
        train(config)
    assert before == (target.read_bytes() if target.is_file() else sorted(target.rglob("*")))


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "checkpoints/step-00000004/state.json"])
def test_what_is_no_regular_file_is_refused_and_does_not_block(stranger: Path, name: str) -> None:
    (stranger / name).unlink()
    os.mkfifo(stranger / name)
    words = ["inspect", *SMALL] if name.endswith("state.json") else ["report"]
    with pytest.raises(UserError, match=r"regular file"):
        verb(*words, str(stranger))


def test_declared_sizes_are_compared_with_the_files_before_memory_is_asked_for(stranger: Path) -> None:
    edit_state(stranger, lambda state: state["config"]["model"].update(dim=1 << 16, heads=1 << 8))
    with pytest.raises(UserError, match=r"declares a model of at least [\d,]+ bytes, but its files have"):
        verb("inspect", *SMALL, str(stranger))


def metadata_of(run: Path) -> object:
    return pickle.loads((checkpoint_of(run) / ".metadata").read_bytes())


@pytest.mark.parametrize(
    "change", [{"relative_path": "/etc/passwd"}, {"relative_path": "../../secret"}, {"offset": 1 << 40}]
)
def test_metadata_that_names_bytes_outside_the_checkpoints_files_are_refused(
    stranger: Path, change: dict[str, object]
) -> None:
    metadata: object = metadata_of(stranger)
    for part in metadata.storage_data.values():  # type: ignore[attr-defined]
        part.__dict__.update(change)
    (checkpoint_of(stranger) / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(checkpoint_of(stranger))
    with pytest.raises(UserError, match="which is not a part of this checkpoint"):
        verb("inspect", *SMALL, str(stranger))


def test_a_tensor_that_is_larger_in_the_metadata_than_in_the_files_is_refused(stranger: Path) -> None:
    metadata = metadata_of(stranger)
    sizes = {path.name: path.stat().st_size for path in checkpoint_of(stranger).iterdir()}
    check_storage(metadata, sizes)  # type: ignore[arg-type] # as it is, it passes
    tensor = next(iter(metadata.state_dict_metadata.values()))  # type: ignore[attr-defined]
    tensor.size = type(tensor.size)([1 << 40])
    with pytest.raises(pickle.UnpicklingError, match=r"bytes by the metadata, and [\d,]+ in the files"):
        check_storage(metadata, sizes)  # type: ignore[arg-type]


def test_a_compressed_part_is_refused(tmp_path: Path) -> None:
    """A part of a few kilobytes that unpacks to 64 MiB."""

    class Info:
        relative_path, offset, length = "part", 0, 0

    with zipfile.ZipFile(tmp_path / "part", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(64 << 20))
    Info.length = (tmp_path / "part").stat().st_size
    with (tmp_path / "part").open("rb") as file, pytest.raises(pickle.UnpicklingError, match="unpacks to"):
        PartReader(file, Info)


def test_a_symbolic_link_among_a_checkpoints_files_is_refused(stranger: Path, tmp_path: Path) -> None:
    path = checkpoint_of(stranger) / "__0_0.distcp"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is no regular file"):
        verb("inspect", *SMALL, str(stranger))


def test_text_of_a_run_is_inert_in_pages_and_tables(stranger: Path) -> None:
    """A run named like a spreadsheet formula, with a script in its configuration."""
    edit_config(stranger, "corpus = ", "corpus = '<script>alert(1)</script>'")
    other = stranger.parent / "=cmd"
    shutil.copytree(stranger, other)
    assert verb("report", str(stranger), str(other), "--output", str(stranger / "both")) == 0
    assert "<script>alert(1)" not in (stranger / "both/index.html").read_text()
    for table in (stranger / "both").glob("*.csv"):
        for line in table.read_text().splitlines():
            assert not line.startswith("="), (table, line)
            assert ",=" not in line, (table, line)


def test_a_sweeps_output_from_elsewhere_is_compared_and_not_run(tmp_path: Path, tiny_options: list[str]) -> None:
    module, marker = program(tmp_path)
    (tmp_path / "s.toml").write_text("config = 'debug.toml'\nseeds = [0]\n[arms.a]\n")
    configs, run = tmp_path / "out/configs", tmp_path / "out/runs/a--seed0"
    configs.mkdir(parents=True)
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    (configs / "a--seed0.toml").write_text(f"[extensions]\nmodules = [{str(module)!r}]\n")
    words = [word for word in tiny_options if "output_dir" not in word]
    with pytest.raises(UserError, match="has changed since a--seed0 was run"):
        verb("sweep", "--config", str(tmp_path / "s.toml"), "--output", str(tmp_path / "out"), "--tables", *words)
    assert not marker.exists()
