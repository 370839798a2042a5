"""Damaged checkpoints are detected before anything is loaded, and mangled files give one-line errors, not
tracebacks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers.commands import TINY
from tests.helpers.runs import Make, rows, train, untimed
from titan_moe.checkpoint.manifest import BLOCK_BYTES, DamageError, entry_of, read_manifest, verify, write_manifest
from titan_moe.checkpoint.resume import newest_good
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.checkpoint.saver import steps_to_delete
from titan_moe.checkpoint.state import read_state
from titan_moe.config.load import load_config
from titan_moe.errors import UserError
from titan_moe.parallel.mesh import single

MESH = single(torch.device("cpu"))
FILES = ("__0_0.distcp", ".metadata", "state.json", "manifest.json")


def flip(path: Path, other: Path) -> None:  # noqa: ARG001 - the signature of all of DAMAGES
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x20
    path.write_bytes(data)


def truncate(path: Path, other: Path) -> None:  # noqa: ARG001
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path, other: Path) -> None:  # noqa: ARG001
    path.write_bytes(b"")


def delete(path: Path, other: Path) -> None:  # noqa: ARG001
    path.unlink()


def replace_by_older(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


DAMAGES: list[Callable[[Path, Path], None]] = [flip, truncate, empty, delete, replace_by_older]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> RunDir:
    """A run with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    words = [*TINY, f"--data.corpus={corpus_dir}", f"--data.cache_dir={cache_dir}", f"--job.output_dir={folder}"]
    config = load_config("debug", [*words, "--training.steps=4"])
    train(config)
    return RunDir(config)


@pytest.fixture
def copied(saved: RunDir, tiny_config: Make) -> RunDir:
    """A copy of that run, for one test to damage."""
    run_dir = RunDir(tiny_config())
    shutil.copytree(saved.path, run_dir.path)
    return run_dir


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_makes_the_run_resume_from_the_checkpoint_before(
    copied: RunDir, name: str, damage: Callable[[Path, Path], None]
) -> None:
    newest, older = copied.checkpoint(4), copied.checkpoint(2)
    assert {path.name for path in newest.iterdir()} == set(FILES)
    assert newest_good(copied, MESH) == newest
    damage(newest / name, older / name)
    assert newest_good(copied, MESH) == older
    (aside,) = copied.checkpoints.glob("aside-*")
    assert aside.name == "aside-step-00000004-1"
    reason = (aside / "REASON").read_text()
    assert name in reason or (name == "state.json" and damage is delete)
    assert copied.saved_steps() == [2]


def test_a_run_resumed_before_a_damaged_checkpoint_writes_the_same_rows(
    saved: RunDir, copied: RunDir, tiny_config: Make
) -> None:
    flip(copied.checkpoint(4) / "__0_0.distcp", Path())
    rows_after = train(tiny_config("--training.steps=4"))
    assert untimed(rows_after) == untimed(rows(saved))
    assert copied.saved_steps() == [2, 4]


def test_without_an_undamaged_checkpoint_the_run_starts_over_only_when_told(
    saved: RunDir, copied: RunDir, tiny_config: Make
) -> None:
    before = copied.metrics.read_bytes()
    for step in (2, 4):
        truncate(copied.checkpoint(step) / "__0_0.distcp", Path())
    for _ in range(2):
        with pytest.raises(UserError, match=r"no usable checkpoint.*--checkpoint\.start_over=true"):
            train(tiny_config("--training.steps=4"))
        assert copied.metrics.read_bytes() == before
    assert untimed(train(tiny_config("--training.steps=4", "--checkpoint.start_over=true"))) == untimed(rows(saved))
    assert len(list(copied.checkpoints.glob("aside-*"))) == 2
    assert (copied.path / "metrics-aside.jsonl").read_bytes() == before


def test_damaged_checkpoints_do_not_count_towards_keep(copied: RunDir, tiny_config: Make) -> None:
    truncate(copied.checkpoint(2) / "state.json", Path())
    train(tiny_config("--training.steps=6", "--checkpoint.keep=2"))
    assert copied.saved_steps() == [4, 6]


def test_a_checkpoint_of_another_format_version_is_refused_and_not_renamed(copied: RunDir) -> None:
    state = copied.checkpoint(4) / "state.json"
    state.write_text(state.read_text().replace('"format_version": 2', '"format_version": 1'))
    (copied.checkpoint(4) / "manifest.json").unlink()
    with pytest.raises(UserError, match="has format version 1; this program reads 2"):
        newest_good(copied, MESH)
    assert copied.checkpoint(4).exists()


def test_every_rank_verifies_only_its_blocks(tmp_path: Path) -> None:
    """Three blocks on three ranks: only the rank with the altered block reports it."""
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    path = folder / "data"
    path.write_bytes(bytes(BLOCK_BYTES) + b"x" * BLOCK_BYTES + b"end")
    write_manifest(folder, 1, {"data": entry_of(path)})
    entries = read_manifest(folder)
    assert len(entries["data"].blocks) == 3
    flip(path, path)  # alters the first block: a third of the file is less than one block
    with pytest.raises(DamageError, match="checksum of block 0"):
        verify(folder, entries, 0, 3)
    verify(folder, entries, 1, 3)
    verify(folder, entries, 2, 3)


MANGLED = settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def assert_one_line(error: Exception) -> None:
    assert "\n" not in str(error)


@st.composite
def mangled(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with some bytes replaced, removed or inserted."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        data[start:end] = draw(
            st.binary(max_size=12) | st.sampled_from([b"[" * 3000, b"{}", b"null", b"1e999", b'"', b"\n"])
        )
    return bytes(data)


@MANGLED
@given(data=st.data())
def test_a_mangled_manifest_is_refused_in_one_line(copied: RunDir, saved: RunDir, data: st.DataObject) -> None:
    good = (saved.checkpoint(4) / "manifest.json").read_bytes()
    bad = data.draw(mangled(good))
    (copied.checkpoint(4) / "manifest.json").write_bytes(bad)
    try:
        rows_after = read_manifest(copied.checkpoint(4))
    except DamageError as error:
        assert_one_line(error)
    else:
        assert rows_after == read_manifest(saved.checkpoint(4))


@MANGLED
@given(data=st.data())
def test_a_mangled_state_is_refused_in_one_line(copied: RunDir, saved: RunDir, data: st.DataObject) -> None:
    good = (saved.checkpoint(4) / "state.json").read_bytes()
    (copied.checkpoint(4) / "state.json").write_bytes(data.draw(mangled(good)))
    try:
        state = read_state(copied.checkpoint(4), "checkpoint")
    except UserError as error:
        assert_one_line(error)
    else:
        assert state.format_version == 2


@MANGLED
@given(data=st.data(), step=st.integers(0, 5))
def test_mangled_metrics_are_cut_to_complete_rows(
    copied: RunDir, saved: RunDir, data: st.DataObject, step: int
) -> None:
    good = saved.metrics.read_bytes()
    copied.metrics.write_bytes(data.draw(mangled(good)))
    copied.has_validation(step)
    copied.cut_metrics(step)
    for line in copied.metrics.read_text(errors="replace").splitlines():
        assert json.loads(line)["step"] <= step
    assert copied.cut_metrics(step) == 0


GOOD_TOML = b"""
[model]
dim = 64
layers = 3
[model.moe]
experts = 8
top_k = 2
[regularizers]
measure = ["sp"]
lb.weight = 1e-2
[training]
steps = 10
dtype = "float32"
"""


@MANGLED
@given(text=mangled(GOOD_TOML))
@example(text=b"\xff\xfe")
@example(text=b"a = " + b"[" * 5000)
def test_mangled_toml_is_refused_in_one_line(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text)
    try:
        load_config(str(path))
    except UserError as error:
        assert_one_line(error)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_checkpoints_saved_by_a_signal_do_not_displace_regular_ones(keep: int) -> None:
    """Saving also at steps 13, 14 and 21 leaves the same checkpoints in the end, and never more than `keep`."""

    def steps_left(saves: list[int]) -> list[int]:
        steps: list[int] = []
        for step in saves:
            steps.append(step)
            steps = [old for old in steps if old not in steps_to_delete(steps, keep, interval=5)]
            assert len(steps) <= keep
            assert step in steps
        return steps

    assert steps_left([5, 10, 13, 14, 15, 20, 21, 23]) == steps_left([5, 10, 15, 20, 23])
