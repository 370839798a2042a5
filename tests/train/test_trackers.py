"""Trackers: those that ship, offline and for real; a user's own; the progress bar on a terminal."""

import importlib.util
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.commands import ROOT
from tests.helpers.runs import Make, rows, train
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.cli import parse
from titan_moe.config import extensions
from titan_moe.config.load import load_config
from titan_moe.data.prepare import prepare
from titan_moe.errors import UserError

SIX = ["--metrics.interval=2", "--metrics.tensorboard=false", "--checkpoint.interval=0"]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: pip install {package}")


def shown(found: list[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Steps and scalars that a dashboard gets of these rows."""
    points = []
    for row in found:
        if row["kind"] == "validation" or row["step"] == 1 or row["step"] % 2 == 0:
            scalars = {name: value for name, value in row.items() if name not in ("step", "kind", "data_crc")}
            points.append((row["step"], {n if "/" in n else f"{row['kind']}/{n}": v for n, v in scalars.items()}))
    return points


IMAGES = {"routing/load", "routing/cond_0_1", "routing/cond_1_2"}


@needs("wandb")
def test_wandb_offline(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes' worth of one run: the same id, and what the files hold is what metrics.jsonl holds."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [*SIX, "--metrics.trackers=wandb", "--lr_scheduler.decay=none"]
    train(tiny_config(*words, "--training.steps=4"))
    config = tiny_config(*words)
    wanted = rows_by_process(train(config))
    folder = RunDir(config).path
    run_id = (folder / "wandb-id").read_text()
    files = sorted(
        folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert len(files) == 2
    for path, part in zip(files, wanted, strict=True):
        name, history = read_wandb(path)
        assert name == "debug"
        assert [(step, scalars) for step, scalars, images in history if not images] == shown(part)
        pictured = [step for step, _, images in history if images == IMAGES]
        assert pictured == [row["step"] for row in part if row["kind"] == "validation"]


def rows_by_process(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of a run that was stopped after step 4, and of the one that went on."""
    first = [row for row in found if row["step"] <= 4]
    return [first, found[len(first) :]]


def read_wandb(path: Path) -> tuple[str, list[tuple[int, dict[str, float], set[str]]]]:
    """Run name, and (step, scalars, names of images) of each history record, from an offline run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 30
    records: list[Any] = []
    while not any(record.HasField("exit") for record in records):  # W&B's own process writes it
        assert time.monotonic() < deadline, path
        time.sleep(0.1)
        records = [Record.FromString(data) for data in log_records(path.read_bytes())]
    name, history = "", []
    for record in records:
        name = record.run.display_name or name
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            images = {key.removesuffix("/_type") for key in items if key.endswith("/_type")}
            kept = {key: value for key, value in items.items() if not key.startswith(("_", *images))}
            history.append((kept.pop("step"), kept, images))
    return name, history


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format, behind W&B's header of 7 bytes: blocks of 32 KiB, chunks of (crc, length,
    kind)."""
    place, parts, block = 7, b"", 1 << 15
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the only chunk of a record, or its last
            yield parts
            parts = b""


@needs("wandb")
def test_wandb_without_an_account_is_the_users_mistake(tiny_options: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "titan_moe.cli", "train", *tiny_options, "--metrics.trackers=wandb"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "error: metrics.trackers: wandb: " in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("; set WANDB_MODE=offline to go without")


@needs("trackio")
def test_trackio_locally(tiny_options: list[str], tmp_path: Path, tiny_config: Make) -> None:
    """In processes without a network: TRACKIO_DIR is read when trackio is imported."""
    words = [*tiny_options, *SIX, "--metrics.trackers=trackio", "--lr_scheduler.decay=none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "trackio")}
    for steps in (4, 6):
        command = [sys.executable, "-c", NO_NETWORK, "train", *words, f"--training.steps={steps}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    query = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([S.get_runs('titan_moe'), S.get_logs('titan_moe', 'debug')]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", query], env=environment, capture_output=True, text=True, check=True
    ).stdout
    runs, logs = json.loads(out.splitlines()[-1])
    assert runs == ["debug"]
    found = [(entry.pop("step"), entry) for entry in logs if entry.pop("timestamp")]
    wanted = shown(rows(RunDir(tiny_config())))
    assert [point for point in found if not set(point[1]) >= IMAGES] == wanted
    assert [step for step, entry in found if set(entry) >= IMAGES] == [0, 3, 4, 6]


NO_NETWORK = """
import socket, sys
def refuse(*arguments): raise AssertionError(f"network: {arguments}")
socket.socket.connect = socket.getaddrinfo = refuse
from titan_moe.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("name", extensions.TRACKER_PACKAGES)
def test_a_missing_package_is_said_before_anything_starts(
    name: str, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as `import` sees a package that is not there
    for flag in ([], ["--check"]):
        arguments = parse(["train", *flag, *tiny_options, f"--metrics.trackers={name}"])
        with pytest.raises(UserError, match=rf"^metrics\.trackers: '{name}' needs a package .* -m pip install {name}$"):
            arguments.run(arguments)
    assert not (tmp_path / "runs").exists()


def test_a_tracker_of_the_users_gets_rows_images_and_the_start(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Mine:
        def __init__(self, config: Any, run_dir: Path) -> None:
            calls.append((config.job.name, run_dir.name))

        def start(self, step: int) -> None:
            calls.append(("start", step))

        def log(self, row: dict[str, Any]) -> None:
            calls.append((row["kind"], row["step"]))

        def log_images(self, step: int, images: dict[str, Any]) -> None:
            assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images.values())
            calls.append((*sorted(images), step))

        def close(self) -> None:
            calls.append(("close",))

    monkeypatch.setitem(extensions.trackers, "mine", Mine)
    train(tiny_config("--metrics.trackers=mine", "--training.steps=1"))
    train(tiny_config("--metrics.trackers=mine", "--training.steps=2"))
    validations = [[("validation", step), (*sorted(IMAGES), step)] for step in (0, 1, 2)]
    begin = ("debug", "debug")
    first = [begin, ("start", 0), *validations[0], ("train", 1), *validations[1], ("close",)]
    assert calls == [*first, begin, ("start", 1), ("train", 2), *validations[2], ("close",)]


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_leaves_the_terminal_as_it_was(presses: int, tiny_options: list[str]) -> None:
    """The bar is drawn on stderr's terminal only, never hides the cursor, and no part of it is left at the end."""
    prepare(load_config("debug", tiny_options))  # else the bar of tokenising is drawn too
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    words = [*tiny_options, "--training.steps=4000", "--validation.interval=0", "--metrics.interval=20"]
    command = [sys.executable, "-m", "titan_moe.cli", "train", *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    os.set_blocking(ours, False)
    text, deadline = "", time.monotonic() + 90
    while "/4000" not in text:
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
        text += drained(ours)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    out, _ = process.communicate(timeout=60)
    text += drained(ours)
    assert process.returncode == 130
    assert "\x1b[?25l" not in text
    assert "\n" not in text.partition("/4000")[2]
    if presses == 1:
        assert text.endswith("\x1b[2K\r")
        assert "the same command goes on from there" in out
    assert "\x1b" not in out


def drained(handle: int) -> str:
    try:
        return os.read(handle, 1 << 20).decode(errors="replace")
    except (BlockingIOError, OSError):
        return ""
