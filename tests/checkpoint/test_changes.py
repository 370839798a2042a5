"""What a resumed run says about changed settings, and what it keeps although files moved, changed or can't be read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, titan_moe
from tests.helpers.runs import Make, rows, train, untimed
from titan_moe.checkpoint.changes import check_unchanged, consequences
from titan_moe.checkpoint.manifest import UnreadableError, read_manifest, verify
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.checkpoint.state import State, dump, read_state
from titan_moe.config.degrees import Degrees
from titan_moe.config.extensions import module_digests
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.runtime.lock import FileLock

DENSE = [
    "--model.moe.first_dense_layers=3",
    "--model.moe.top_k=1",
    "--model.moe.hidden_dim=48",
    *(f"--regularizers.{name}.weight=0" for name in ("lb", "z", "sp", "cp")),
]
ONE_RANK = Degrees(1, 1, 1, 1, 1, 1)
LOCKED = """
import sys, pathlib
from titan_moe.runtime.lock import FileLock
print(FileLock(pathlib.Path(sys.argv[1])).acquire())
"""


def state_of(config: Config, step: int, **facts: object) -> State:
    """What a checkpoint after `step` has in state.json."""
    other = {"format_version": 2, "data": "", "tokenizer": "", "scales": None, "norms": [], "skipped": 0}
    return State.model_validate({**other, "step": step, "config": dump(config), **facts})


def said(before: Config, now: Config, step: int, **facts: object) -> list[str]:
    """What a run that goes on with `now` says."""
    both = check_unchanged(dump(before), now, "it")
    return consequences(both, state_of(before, step, **facts), now, ONE_RANK, {})


def test_a_longer_schedule_says_what_the_next_learning_rate_is_and_was_to_be(tiny_config: Make) -> None:
    """Cosine from 0.01 to 0.001: finished at the lowest, and with twice the steps near the middle."""
    lr = ["--optimizer.lr=0.01", "--lr_scheduler.warmup_steps=0"]
    before = tiny_config(*lr, "--training.steps=10")
    (line,) = said(before, tiny_config(*lr, "--training.steps=20"), step=10)
    assert line.startswith("the learning rate of step 11 is 0.0048, not 0.001 as planned (training.steps 10 -> 20")
    assert said(before, before, step=10) == []
    (line,) = said(before, tiny_config(*lr[1:], "--optimizer.lr=0.02", "--training.steps=10"), step=4)
    assert "optimizer.lr 0.01 -> 0.02" in line


@pytest.mark.parametrize("saved_tokens", [128, 0], ids=["known", "of an earlier version"])
def test_other_microbatches_say_over_how_many_tokens_the_terms_are_formed(tiny_config: Make, saved_tokens: int) -> None:
    before, now = tiny_config(), tiny_config("--training.microbatch_size=1")
    (line,) = said(before, now, step=2, step_tokens=saved_tokens)
    assert line.startswith("regularizers.lb: formed over 32 tokens (a microbatch), before over 128;")
    by_sequence = "--regularizers.lb.scope=sequence"
    before, now = tiny_config(by_sequence), tiny_config("--training.microbatch_size=1", by_sequence)
    assert said(before, now, step=2, step_tokens=saved_tokens) == []


def test_every_changed_key_that_alters_the_numbers_is_said(tiny_config: Make) -> None:
    words = ["--training.max_grad_norm=0.5", "--training.skip_spikes=6", "--optimizer.weight_decay=0.2"]
    lines = said(tiny_config(), tiny_config(*words, "--metrics.interval=7"), step=2)
    assert lines == [
        "optimizer.weight_decay: 0.1 -> 0.2",
        "training.max_grad_norm: 1.0 -> 0.5",
        "training.skip_spikes: 0.0 -> 6.0",
    ]


def test_an_edited_module_is_said(tiny_config: Make, tmp_path: Path) -> None:
    module = tmp_path / "mine.py"
    module.write_text("first = 1\n")
    config = tiny_config(f"--extensions.modules={module}")
    before = module_digests(config.extensions.modules)
    assert [*before] == ["mine.py"]
    module.write_text("second = 2\n")
    now = module_digests(config.extensions.modules)
    both = check_unchanged(dump(config), config, "it")
    state = state_of(config, 2, modules=before)
    assert consequences(both, state, config, ONE_RANK, before) == []
    (line,) = consequences(both, state, config, ONE_RANK, now)
    assert line.startswith("extensions.modules: mine.py is not the file that the run was made with")


def test_the_command_says_the_changes_when_it_goes_on(tiny_options: list[str]) -> None:
    assert titan_moe("train", *tiny_options, "--training.steps=4").returncode == 0
    more = titan_moe("train", *tiny_options, "--training.steps=6", "--training.microbatch_size=1")
    assert more.returncode == 0, more.stderr
    assert "from step 5 on: the learning rate of step 5 is" in more.stdout
    assert "from step 5 on: regularizers.lb: formed over 32 tokens" in more.stdout


@pytest.fixture
def finished(tiny_config: Make) -> RunDir:
    """A run of four steps with checkpoints after steps 2 and 4."""
    config = tiny_config("--training.steps=4")
    train(config)
    return RunDir(config)


def test_a_run_goes_on_with_its_tokenizer_when_the_text_has_moved_or_grown(
    finished: RunDir, tiny_config: Make, corpus_dir: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved" / corpus_dir.name
    shutil.copytree(corpus_dir, moved)
    assert train(tiny_config(f"--data.corpus={moved}"))[-1]["step"] == 6
    (moved / "more.txt").write_text("further text, quite other words: zyxwv\n" * 50)
    words = [f"--data.corpus={moved}", "--training.steps=8"]
    with pytest.raises(UserError, match=r"text is not the one.*--checkpoint\.allow_new_data=true"):
        train(tiny_config(*words))
    train(tiny_config(*words, "--checkpoint.allow_new_data=true"))
    states = [read_state(finished.checkpoint(step), "") for step in (4, 8)]
    assert states[0].tokenizer == states[1].tokenizer
    assert states[0].data != states[1].data


@pytest.mark.parametrize("key", ["load_path", "upcycle_path"])
def test_weights_are_never_read_under_another_tokenizers_ids(tiny_config: Make, tmp_path: Path, key: str) -> None:
    """Other text: the tokenizer of the weights is taken, and another one, if given, is refused."""
    upcycles = key == "upcycle_path"
    source = tiny_config("--job.name=source", "--training.steps=2", *(DENSE if upcycles else ()))
    train(source)
    text = tmp_path / "text"
    text.mkdir()
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[50:90]:
        (text / path.name).write_bytes(path.read_bytes()[:12_000])
    words = [f"--data.corpus={text}", "--training.steps=2", *(["--model.moe.hidden_dim=48"] if upcycles else [])]
    start = f"--checkpoint.{key}={RunDir(source).path}"
    other = tiny_config("--job.name=other", *words, start)
    train(other)
    first, second = (read_state(RunDir(config).newest() or Path(), "") for config in (source, other))
    assert first.tokenizer == second.tokenizer
    elsewhere = tiny_config("--job.name=elsewhere", *words)
    train(elsewhere)
    refused = tiny_config(
        "--job.name=x", *words, start, f"--tokenizer.path={RunDir(elsewhere).path / 'tokenizer.model'}"
    )
    with pytest.raises(UserError, match="its weights belong to another tokenizer"):
        train(refused)


def test_a_run_directory_with_another_tokenizer_is_refused(finished: RunDir, tiny_config: Make) -> None:
    (finished.path / "tokenizer.model").write_bytes((finished.path / "tokenizer.model").read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"tokenizer\.model: not the tokenizer that the run's checkpoints were trained with"
    ):
        train(tiny_config())


def test_a_run_of_an_earlier_version_has_no_tokenizer_and_gets_it_when_it_goes_on(
    finished: RunDir, tiny_config: Make
) -> None:
    model = (finished.path / "tokenizer.model").read_bytes()
    (finished.path / "tokenizer.model").unlink()
    train(tiny_config())
    assert (finished.path / "tokenizer.model").read_bytes() == model


@pytest.mark.parametrize("name", ["manifest.json", "__0_0.distcp", "state.json"])
def test_a_file_that_cannot_be_read_now_stops_the_run_and_changes_nothing(
    finished: RunDir, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An input/output error of a file server, as `open` gives it."""
    before = {
        path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file() and "logs" not in path.parts
    }
    path = finished.checkpoint(4) / name
    fails = failing(path)
    monkeypatch.setattr(os, "open", fails(os.open))
    monkeypatch.setattr(Path, "open", fails(Path.open))
    with pytest.raises(UserError, match=rf"{name}: can't be read: Input/output error"):
        train(tiny_config())
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in before} == before
    assert train(tiny_config())[-1]["step"] == 6


def failing(path: Path):  # type: ignore[no-untyped-def]
    """Makes a function that opens files fail for one path."""

    def wrap(function):  # type: ignore[no-untyped-def]
        def opened(given, *arguments, **options):  # type: ignore[no-untyped-def]
            if Path(given) == path:
                raise OSError(5, "Input/output error", str(path))
            return function(given, *arguments, **options)

        return opened

    return wrap


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user, so root")
def test_checkpoints_of_another_user_are_neither_renamed_nor_replaced(finished: RunDir) -> None:
    for path in finished.checkpoint(4).iterdir():
        path.chmod(0)
    code = "import sys, pathlib, titan_moe.checkpoint.run_dir as r; r.saved_steps(pathlib.Path(sys.argv[1]))"
    for path in (finished.path, *finished.path.parents):
        if path != Path("/") and path.stat().st_uid == 0 and str(path).startswith("/tmp/"):
            path.chmod(0o755)
    done = subprocess.run(
        [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            sys.executable,
            "-c",
            code,
            str(finished.checkpoints),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UnreadableError" in done.stderr
    assert "Permission denied" in done.stderr


def test_only_a_wrong_checksum_or_size_is_damage(finished: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished.checkpoint(4)
    entries = read_manifest(folder)
    monkeypatch.setattr(Path, "open", failing(folder / "__0_0.distcp")(Path.open))
    with pytest.raises(UnreadableError):
        verify(folder, entries)


def test_a_run_whose_checkpoints_are_gone_does_not_start_over_by_itself(finished: RunDir, tiny_config: Make) -> None:
    before = finished.metrics.read_bytes()
    shutil.rmtree(finished.checkpoints)
    with pytest.raises(UserError, match=r"no usable checkpoint, but it has made 4 steps"):
        train(tiny_config())
    assert finished.metrics.read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_keeps_its_rows(
    finished: RunDir, tiny_config: Make
) -> None:
    """One row, and checkpoints every two steps: none was due."""
    expected = untimed(rows(finished))
    first = [line for line in finished.metrics.read_bytes().splitlines(keepends=True) if json.loads(line)["step"] <= 1]
    finished.metrics.write_bytes(b"".join(first))
    shutil.rmtree(finished.checkpoints)
    assert untimed(train(tiny_config("--training.steps=4"))) == expected
    assert (finished.path / "metrics-aside.jsonl").read_bytes() == b"".join(first)


def test_old_checkpoints_behind_symbolic_links_and_odd_names_are_left_alone(
    finished: RunDir, tiny_config: Make, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(finished.checkpoint(2), elsewhere)
    finished.checkpoint(2).symlink_to(elsewhere)
    (finished.checkpoints / "step-00000099").write_text("a file")
    (finished.checkpoints / "step-000000099").mkdir()
    assert train(tiny_config("--checkpoint.keep=1"))[-1]["step"] == 6
    assert finished.saved_steps() == [6]
    assert (elsewhere / "manifest.json").exists()


def test_without_the_systems_locks_a_file_says_who_owns_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flock fails as on Lustre. A second process is refused, and takes over what was not touched for long."""

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    first, second = FileLock(tmp_path / ".lock"), FileLock(tmp_path / ".lock")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    long_ago = (tmp_path / ".lock-owner").stat().st_mtime - 3600
    os.utime(tmp_path / ".lock-owner", (long_ago, long_ago))
    third = FileLock(tmp_path / ".lock")
    assert third.acquire()
    third.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


def test_the_systems_lock_is_held_against_other_processes(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / ".lock")
    assert lock.acquire()
    command = [sys.executable, "-c", LOCKED, str(tmp_path / ".lock")]
    run = lambda: subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()  # noqa: E731
    assert run() == "False"
    lock.release()
    assert run() == "True"
