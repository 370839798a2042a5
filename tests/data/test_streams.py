"""Streamed corpora: the shards do not depend on how often the writer was stopped, nor the order on how much is written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import ROOT, environment
from tests.helpers.hub import make_c4
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.data.loader import DataRank, StepData, TrainingLoader
from titan_moe.data.prepare import Prepared, prepare
from titan_moe.data.stream_reader import StreamedWindows, training_windows
from titan_moe.data.stream_writer import BackgroundWriter, Writer, write_stream
from titan_moe.data.streams import Rows, StreamedShard, StreamFolder
from titan_moe.errors import UserError
from titan_moe.runtime.lock import FileLock

pytest.importorskip("datasets")

SEQ, BATCH = 32, 4
DOCUMENTS = 400


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("hub")
    return folder, make_c4(folder, DOCUMENTS)


@pytest.fixture(autouse=True)
def _in_hub(hub: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub[0])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tokenizer(hub: tuple[Path, list[str]]) -> Path:
    """A tokenizer of the training text."""
    path = hub[0] / "text.txt"
    path.write_text("\n".join(hub[1]))
    words = [f"--data.corpus={path}", "--tokenizer.vocab_size=350", f"--data.cache_dir={hub[0] / 'cache'}"]
    made = hub[0] / "t.model"
    made.write_bytes(prepare(load_config("debug", words)).tokenizer.model)
    return made


def config_of(cache: Path, tokenizer: Path, *words: str) -> Config:
    options = [f"--data.cache_dir={cache}", f"--tokenizer.path={tokenizer}", "--data.corpus=c4"]
    options += ["--data.shuffle_tokens=512", f"--training.seq_len={SEQ}", f"--training.batch_size={BATCH}"]
    return load_config("debug", [*options, "--training.steps=60", *words])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def windows_of(prepared: Prepared, positions: bool = False) -> StreamedWindows:
    windows = training_windows(prepared.folder, prepared.manifest, SEQ, prepared.tokenizer.eos, positions)
    assert isinstance(windows, StreamedWindows)
    return windows


def taken(windows: StreamedWindows, first: int, count: int, part: DataRank | None = None) -> list[StepData]:
    loader = TrainingLoader(windows, BATCH, 3, part or DataRank(BATCH), checksum=True)
    steps = loader.steps(first)
    try:
        return [next(steps) for _ in range(count)]
    finally:
        steps.close()


def test_the_stream_is_the_corpus_without_validation_texts(
    hub: tuple[Path, list[str]], tmp_path: Path, tokenizer: Path
) -> None:
    prepared = prepare(config_of(tmp_path, tokenizer, "--training.steps=100000"), whole=True)
    windows = windows_of(prepared)
    stream, decode = windows.stream, prepared.tokenizer.decode
    assert stream.folder.ended
    starts = stream.starts_of(np.arange(DOCUMENTS))
    ids = np.split(stream.read(0, len(stream)), starts[1:].tolist())
    assert [decode(one.tolist()[1:-1]) for one in ids] == hub[1]
    assert {(int(one[0]), int(one[-1])) for one in ids} == {(prepared.tokenizer.bos, prepared.tokenizer.eos)}
    # Documents and labels are those of a search over all starts.
    positions = np.arange(len(stream) + 5)
    assert np.array_equal(stream.documents_at(positions), np.searchsorted(starts, positions, side="right") - 1)
    batch = windows.batch(np.array([0, 3, len(windows) - 1]))
    assert batch.label_count == int(batch.loss_mask.sum())
    assert prepared.manifest.splits["validation"].documents == 60


def test_any_stops_of_the_writer_give_the_same_shards(tmp_path: Path, tokenizer: Path) -> None:
    whole = prepare(config_of(tmp_path / "whole", tokenizer), whole=True)
    parts = prepare(config_of(tmp_path / "parts", tokenizer))
    assert parts.manifest == whole.manifest
    wanted = files(whole.folder)
    count = len(StreamFolder(whole.folder).shards)
    assert count > 10
    # One shard per writer, each of which has to find its place in the text again, also in the middle of a file.
    for number in range(1, count + 1):
        write_stream(StreamFolder(parts.folder), StreamFolder(parts.folder).tokens + 1)
        assert len(StreamFolder(parts.folder).shards) == number + 1 or number == count
    assert {name: raw for name, raw in files(parts.folder).items() if name in wanted} == wanted


def test_another_version_of_datasets_skips_the_rows_that_were_read(tmp_path: Path, tokenizer: Path) -> None:
    folder = StreamFolder(prepare(config_of(tmp_path, tokenizer), whole=True).folder)
    position = folder.shards[4].position
    texts = [document.text for document in Rows("c4", "train", position)]
    rows = Rows("c4", "train", position | {"datasets": "0", "state": {}})
    found = [next(rows.documents).text for _ in range(30)]
    assert found == texts[:30]
    again = Rows("c4", "train", json.loads(json.dumps(rows.position())))
    assert [document.text for document in again] == texts[30:]


@pytest.mark.parametrize("lost", [".json", ".bin", "-documents.npy", "altered facts", "cut"])
def test_a_lost_shard_is_written_again_and_those_behind_it_are_kept(lost: str, tmp_path: Path, tokenizer: Path) -> None:
    config = config_of(tmp_path, tokenizer)
    folder = prepare(config, whole=True).folder
    wanted, stream = files(folder), StreamFolder(folder)
    last = stream.path(len(stream.shards) - 1, ".json").stat().st_mtime_ns
    if lost == "altered facts":
        facts = stream.path(3, ".json")
        facts.write_text(facts.read_text().replace('"ended": false', '"ended": true'))
    elif lost == "cut":
        stream.path(3, ".bin").write_bytes(b"abc")
    else:
        stream.path(3, lost).unlink()
    prepare(config, whole=True)
    assert files(folder) == wanted
    assert stream.path(len(stream.shards) - 1, ".json").stat().st_mtime_ns == last


def test_a_shard_with_another_content_is_named_when_it_is_read(tmp_path: Path, tokenizer: Path) -> None:
    prepared = prepare(config_of(tmp_path, tokenizer), whole=True)
    path = StreamFolder(prepared.folder).path(1, ".bin")
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(bytes(raw))
    windows = windows_of(prepared)
    taken(windows_of(prepared), 0, 1)
    with pytest.raises(
        UserError, match=rf"{path}: damaged \(its checksum differs\); delete {path} to prepare it again"
    ):
        windows.batch(np.arange(16, 40))


def test_the_order_is_a_permutation_within_groups_and_the_same_for_a_part(tmp_path: Path, tokenizer: Path) -> None:
    whole = windows_of(prepare(config_of(tmp_path / "whole", tokenizer, "--training.steps=100000"), whole=True))
    part = windows_of(prepare(config_of(tmp_path / "part", tokenizer, "--training.steps=30"), whole=True))
    order = np.concatenate([whole.of_step(BATCH, 3, step) for step in range(2 * len(whole) // BATCH + 1)])
    epochs = [order[: len(whole)], order[len(whole) : 2 * len(whole)]]
    for epoch in epochs:
        for first in range(0, len(whole), whole.group):
            block = epoch[first : first + whole.group]
            assert sorted(block) == list(range(first, first + len(block)))
    assert not np.array_equal(*epochs)
    assert not part.stream.folder.ended
    assert np.array_equal(np.concatenate([part.of_step(BATCH, 3, step) for step in range(30)]), order[: 30 * BATCH])
    for ours, theirs in zip(taken(part, 0, 30), taken(whole, 0, 30), strict=True):
        assert ours[1] == theirs[1]
        assert all((a == b).all() for a, b in zip(ours[0][0][:6], theirs[0][0][:6], strict=True))


def test_ranks_divide_the_steps(tmp_path: Path, tokenizer: Path) -> None:
    windows = windows_of(prepare(config_of(tmp_path, tokenizer), whole=True), positions=True)
    for whole, *parts in zip(
        taken(windows, 5, 4),
        *(taken(windows_of_again(windows), 5, 4, DataRank(2, rank, 2)) for rank in (0, 1)),
        strict=True,
    ):
        assert {crc for _, crc in (whole, *parts)} == {whole[1]}
        tokens = [batch.tokens for batches, _ in parts for batch in batches]
        assert (np.concatenate(tokens) == np.concatenate([batch.tokens for batch in whole[0]])).all()


def windows_of_again(windows: StreamedWindows) -> StreamedWindows:
    folder = windows.stream.folder
    again = training_windows(folder.folder, folder.manifest, SEQ, windows.pad_id, windows.document_positions)
    assert isinstance(again, StreamedWindows)
    return again


def test_a_budget_ends_the_stream_and_further_steps_begin_anew(tmp_path: Path, tokenizer: Path) -> None:
    prepared = prepare(config_of(tmp_path, tokenizer, "--data.tokens=2000"), whole=True)
    windows = windows_of(prepared)
    assert windows.stream.folder.ended
    assert 2000 <= len(windows.stream) < 2100
    order = np.concatenate([windows.of_step(BATCH, 0, step) for step in range(60)])
    assert sorted(order[: len(windows)]) == list(range(len(windows)))
    unbounded = prepare(config_of(tmp_path, tokenizer))
    assert unbounded.folder != prepared.folder


def test_the_fingerprint_is_that_of_the_definition(tmp_path: Path, tokenizer: Path) -> None:
    first = prepare(config_of(tmp_path / "a", tokenizer))
    assert first.manifest.fingerprint == first.folder.name
    assert prepare(config_of(tmp_path / "b", tokenizer, "--training.steps=999")).folder.name == first.folder.name
    other = prepare(config_of(tmp_path / "b", tokenizer, "--data.shuffle_tokens=640"))
    assert other.folder.name != first.folder.name


def test_the_loader_waits_for_a_shard_and_can_be_closed_meanwhile(tmp_path: Path, tokenizer: Path) -> None:
    prepared = prepare(config_of(tmp_path, tokenizer))
    windows = windows_of(prepared)
    steps = TrainingLoader(windows, BATCH, 3, DataRank(BATCH), checksum=True).steps()
    first = [next(steps) for _ in range(windows.group // BATCH)]
    writer = BackgroundWriter(StreamFolder(prepared.folder), windows.needed(29, BATCH), tmp_path / "log")
    writer.keep_going()
    rest = [next(steps) for _ in range(30 - len(first))]
    began = time.monotonic()
    steps.close()  # its thread waits for step 31
    assert time.monotonic() - began < 5
    assert writer.process is not None
    assert writer.process.wait(timeout=120) == 0
    whole = taken(windows_of(prepare(config_of(tmp_path / "whole", tokenizer), whole=True)), 0, 30)
    assert [crc for _, crc in (*first, *rest)] == [crc for _, crc in whole]


def test_one_process_writes_and_another_goes_on_when_it_ends(tmp_path: Path, tokenizer: Path) -> None:
    prepared = prepare(config_of(tmp_path, tokenizer))
    stream = StreamFolder(prepared.folder)
    lock = FileLock(prepared.folder / ".lock")
    assert lock.acquire()
    second = BackgroundWriter(StreamFolder(prepared.folder), stream.tokens + 2000, tmp_path / "log")
    second.keep_going()
    assert second.process is not None
    with pytest.raises(subprocess.TimeoutExpired):
        second.process.wait(timeout=4)
    Writer(stream).write(stream.tokens + 1000, lambda _: None)
    lock.release()
    assert second.process.wait(timeout=120) == 0
    again = prepare(config_of(tmp_path / "again", tokenizer), whole=True)
    written, wanted = files(prepared.folder), files(again.folder)
    assert len(written) > len(wanted) - 30
    assert all(written[name] == wanted[name] for name in written if name in wanted)


def test_a_writer_that_fails_is_started_again_and_says_why(
    hub: tuple[Path, list[str]], tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory without the data; then it is there again."""
    monkeypatch.setattr("titan_moe.data.stream_writer.PAUSES", (0.0,))
    prepared = prepare(config_of(tmp_path, tokenizer))
    monkeypatch.chdir(tmp_path)
    writer = BackgroundWriter(StreamFolder(prepared.folder), 10**9, tmp_path / "log")
    for _ in range(3):
        assert writer.error is None
        writer.keep_going()
        assert writer.process is not None
        assert writer.process.wait(timeout=120) == 2
    monkeypatch.setattr("titan_moe.data.stream_writer.PAUSES", (60.0,))
    writer.keep_going()
    assert writer.error is not None
    assert writer.error.startswith("data.corpus = 'c4': the hub can't be reached (")
    monkeypatch.chdir(hub[0])
    monkeypatch.setattr("titan_moe.data.stream_writer.PAUSES", (0.0,))
    writer.keep_going()
    assert writer.error is None
    assert writer.process.wait(timeout=120) == 0
    assert StreamFolder(prepared.folder).ended


def test_a_writer_ends_with_its_parent(tmp_path: Path, tokenizer: Path) -> None:
    prepared = prepare(config_of(tmp_path, tokenizer))
    lock = FileLock(prepared.folder / ".lock")
    assert lock.acquire()  # so it only waits
    program = f"""
import sys, time
from pathlib import Path
from titan_moe.data.stream_writer import BackgroundWriter, StreamFolder
writer = BackgroundWriter(StreamFolder(Path({str(prepared.folder)!r})), 10**9, Path({str(tmp_path / "log")!r}))
writer.keep_going()
print(writer.process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    writer = Path("/proc", parent.stdout.readline().strip())
    time.sleep(2)
    assert writer.exists()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 120
    while writer.exists() and "Z" not in (writer / "stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_hub_without_the_data_is_one_line_at_once(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["prepare", "--data.corpus=c4", f"--tokenizer.path={tokenizer}", f"--data.cache_dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "titan_moe.cli", *words]
    variables = environment() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.corpus = 'c4': the hub can't be reached (")
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_facts_of_a_shard_are_checked(tmp_path: Path, tokenizer: Path) -> None:
    """A shard's JSON file from elsewhere is not used: a value of another type, another key, no object."""
    prepared = prepare(config_of(tmp_path, tokenizer))
    stream = StreamFolder(prepared.folder)
    assert isinstance(stream.read(0), StreamedShard)
    good = json.loads(stream.path(0, ".json").read_text())
    for bad in ([], good | {"more": 1}, good | {"tokens": 5}, {}):
        stream.path(0, ".json").write_text(json.dumps(bad))
        assert stream.read(0) is None
    assert os.listdir(prepared.folder)
