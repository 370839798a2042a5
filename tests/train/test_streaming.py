"""Training while the text is tokenised: whatever is killed, a run reads the tokens of a run on a prepared cache."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, TINY, environment
from tests.helpers.hub import make_c4
from tests.helpers.rank_runs import EXACT, assert_same_rows, rows
from tests.helpers.runs import untimed
from titan_moe.data.streams import StreamFolder
from titan_moe.runtime.lock import FileLock

pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

STEPS = 120
STREAM = ["--data.corpus=c4", "--data.shuffle_tokens=512", f"--training.steps={STEPS}", "--checkpoint.interval=25"]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    make_c4(tmp_path, 2500)
    return tmp_path


def words(folder: Path, name: str, cache: str, *more: str) -> list[str]:
    options = [
        *TINY,
        *EXACT,
        *STREAM,
        "--model.layers=2",
        "--tokenizer.vocab_size=400",
        f"--data.cache_dir={folder / cache}",
    ]
    return [*options, f"--job.output_dir={folder / 'runs'}", f"--job.name={name}", *more]


def start(folder: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    every = environment() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", "titan_moe.cli", *command] if command[0].isalpha() else command,
        cwd=folder,
        env=every,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], status: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err + out
    return out + err


def writers(cache: Path) -> list[int]:
    """Process numbers of the writers of a cache."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if b"stream_writer" in command and str(cache).encode() in command:
            found.append(int(path.name))
    return found


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns once metrics.jsonl has a row of a step. Fails when `process` ends."""
    metrics = run / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or (metrics.exists() and f'"step": {step},' in metrics.read_text()))
    assert process.poll() is None, process.communicate()


def shards(cache: Path) -> int:
    return len(list(cache.glob("tokens/*/train-*.json")))


@contextlib.contextmanager
def held_back(folder: Path, options: list[str]) -> Iterator[Path]:
    """Prepares the first shards, and then lets no writer write. Yields the cache's folder of shards."""
    finished(start(folder, "prepare", *options, "--training.steps=1"))
    (shards,) = (folder / "cache" / "tokens").glob("[!.]*")
    lock = FileLock(shards / ".lock")
    assert lock.acquire()
    try:
        yield shards
    finally:
        lock.release()


def wait_until_it_waits(run: Path, process: subprocess.Popen[str]) -> None:
    wait_for_step(run, 4, process)
    wait_for(lambda: "waiting for its text" in (run / "logs" / "rank-0.log").read_text())


def test_whatever_is_killed_the_run_reads_the_same_tokens(hub: Path) -> None:
    finished(start(hub, "prepare", *words(hub, "a", "whole")))
    finished(start(hub, "train", *words(hub, "prepared", "whole")))
    wanted = untimed(rows(hub / "runs" / "prepared"))
    cache, run = hub / "cache", hub / "runs" / "killed"
    command = ["train", *words(hub, "killed", "cache")]

    with held_back(hub, command[1:]):  # the writer is killed, and started again
        process = start(hub, *command)
        wait_until_it_waits(run, process)
        (writer,) = writers(cache)
        os.kill(writer, signal.SIGKILL)
        wait_for(lambda: writers(cache) not in ([], [writer]))
    wait_for(lambda: shards(cache) >= 5)
    for pid in writers(cache):
        os.kill(pid, signal.SIGKILL)
    wait_for_step(run, 30, process)
    for pid in writers(cache):  # both are killed
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()

    process = start(hub, *command)  # the trainer is killed, and its writer ends with it
    wait_for_step(run, 33, process)
    process.kill()
    process.communicate()
    wait_for(lambda: not writers(cache))

    process = start(hub, *command)
    wait_for_step(run, 40, process)
    process.send_signal(signal.SIGTERM)
    assert "Stopped by SIGTERM after step" in finished(process, 128 + signal.SIGTERM)
    assert not writers(cache)

    finished(start(hub, *command))
    assert untimed(rows(run)) == wanted
    (ours,), (theirs,) = ((list((hub / name / "tokens").iterdir())) for name in ("cache", "whole"))
    for index in range(len(StreamFolder(theirs).shards)):
        for kind in (".bin", "-documents.npy", ".json"):
            name = StreamFolder(theirs).path(index, kind).name
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_a_signal_while_the_run_waits_saves_and_the_run_goes_on(hub: Path) -> None:
    cache, run = hub / "cache", hub / "runs" / "waits"
    command = ["train", *words(hub, "waits", "cache", "--checkpoint.interval=0")]
    with held_back(hub, command[1:]):
        process = start(hub, *command)
        wait_until_it_waits(run, process)
        process.send_signal(signal.SIGINT)
        finished(process, 128 + signal.SIGINT)
    assert not writers(cache)
    (saved,) = (run / "checkpoints").glob("step-*")
    assert rows(run)[-1]["step"] == int(saved.name[5:])
    finished(start(hub, *command))
    finished(start(hub, "train", *words(hub, "again", "cache", "--checkpoint.interval=0")))
    assert untimed(rows(run)) == untimed(rows(hub / "runs" / "again"))


def test_a_hub_that_goes_away_stops_the_run_with_a_checkpoint(hub: Path) -> None:
    """After three starts of the writer without a new shard."""
    cache, run = hub / "cache", hub / "runs" / "a"
    command = ["train", *words(hub, "a", "cache", "--checkpoint.interval=0")]
    with held_back(hub, command[1:]):
        process = start(hub, *command, HF_HOME=str(hub / "hf"))
        wait_until_it_waits(run, process)
        (hub / "allenai").rename(hub / "gone")
    said = finished(process, 2).splitlines()[-1]
    assert said.startswith("error: data.corpus = 'c4': the hub can't be reached (")
    assert said.endswith("(the run has saved its state; the same command goes on from there)")
    assert list((run / "checkpoints").glob("step-*"))
    assert not writers(cache)
    (hub / "gone").rename(hub / "allenai")
    finished(start(hub, *command))
    assert rows(run)[-1]["step"] == STEPS


def test_two_ranks_with_one_writer(hub: Path) -> None:
    finished(start(hub, "train", *words(hub, "one", "whole")))
    cache, run = hub / "cache", hub / "runs" / "two"
    command = [str(ROOT / "run_train.sh"), *words(hub, "two", "cache", "--parallelism.ep=2")]
    with held_back(hub, command[1:-1]):
        process = start(hub, *command, NPROC="2")
        wait_until_it_waits(run, process)
        (writer,) = writers(cache)
        os.kill(writer, signal.SIGKILL)
    wait_for_step(run, 30, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    finished(start(hub, *command, NPROC="2"))
    ours, theirs = rows(run), rows(hub / "runs" / "one")
    assert_same_rows(ours, theirs)
    assert [row.get("data_crc") for row in ours] == [row.get("data_crc") for row in theirs]
