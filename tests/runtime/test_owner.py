"""Half-made files and folders: whose they are, and when they are abandoned."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan_moe.runtime import owner
from titan_moe.runtime.owner import (
    ABANDONED_SECONDS,
    fresh_path,
    is_abandoned,
    machine,
    making_folder,
    remove_abandoned,
    replacing,
    touch,
)


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_names_are_unique_and_hidden(tmp_path: Path) -> None:
    names = {fresh_path(tmp_path / "shards").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".shards.") and str(os.getpid()) in name for name in names)


def test_only_what_a_dead_process_of_this_machine_left_is_deleted_at_once(tmp_path: Path) -> None:
    mine, pid = fresh_path(tmp_path / "a"), ended_process()
    dead = tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{pid}-")
    elsewhere = tmp_path / dead.name.replace(machine(), "0123456789ab")
    older = tmp_path / f".a.{pid}"  # the name that earlier versions gave
    others = [tmp_path / "finished", tmp_path / ".gitignore"]
    for path in (mine, dead, elsewhere, older, *others):
        path.mkdir()
        (path / "part").write_text("x")
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in (mine, elsewhere, older, *others)}
    past = time.time() - ABANDONED_SECONDS - 60
    for path in (mine, elsewhere, older, *others):
        os.utime(path / "part", (past, past))
        os.utime(path, (past, past))
    touch(mine)
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in (mine, *others)}


def test_without_proc_only_time_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "machine", lambda: "unknown")
    path = tmp_path / f".a.unknown-{ended_process()}-01234567"
    path.write_text("x")
    assert not is_abandoned(path)
    os.utime(path, (1, 1))
    assert is_abandoned(path)


def test_files_and_folders_appear_complete_or_not_at_all(tmp_path: Path) -> None:
    def broken_off() -> None:
        with replacing(tmp_path / "file") as fresh, making_folder(tmp_path / "folder") as folder:
            fresh.write_text("half")
            (folder / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken_off()
    assert not list(tmp_path.iterdir())
    for content in ("one", "two"):
        with replacing(tmp_path / "file") as fresh:
            fresh.write_text(content)
        with making_folder(tmp_path / "folder") as fresh:
            (fresh / "file").write_text(content)
    assert (tmp_path / "file").read_text() == "two"
    assert (tmp_path / "folder" / "file").read_text() == "one"  # of two makers, the first one's stays
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
