"""Readers of a run's files: whatever the files hold, the command ends with one line and the right status, in little time and
memory."""

import json
import os
import random
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import TINY, environment
from tests.helpers.runs import train
from tests.helpers.strangers import copied_run, sign, verb
from titan_moe import cli
from titan_moe.analysis.report.report import differences, facts, summary
from titan_moe.analysis.report.runs import read_runs
from titan_moe.checkpoint.chosen import from_checkpoint
from titan_moe.checkpoint.resume import damage
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.checkpoint.state import read_state
from titan_moe.config.load import load_config
from titan_moe.errors import UserError
from titan_moe.parallel.mesh import single

COUNT = 2000
SECONDS, BYTES = 10, 1 << 30
ODD = [
    "null",
    "true",
    "-1",
    "1e999",
    "NaN",
    "9" * 400,
    "9" * 5000,
    '""',
    '"\\ud83d"',
    "[]",
    "{}",
    "[" * 3000,
    '"' + "x" * 70000 + '"',
]
FILES = {  # what to mangle: the file of a run directory, and the verb that reads it
    "state.json": ("checkpoints/step-00000004/state.json", "inspect"),
    "manifest.json": ("checkpoints/step-00000004/manifest.json", "inspect"),
    "config.toml": ("config.toml", "report"),
    "metrics.jsonl": ("metrics.jsonl", "report"),
    "inspection": ("inspect/step-00000004.json", "report"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> Path:
    """A run of four steps, with an inspection."""
    folder = tmp_path_factory.mktemp("made")
    words = [*TINY, f"--data.corpus={corpus_dir}", f"--data.cache_dir={cache_dir}", f"--job.output_dir={folder}"]
    config = load_config("debug", [*words, "--training.steps=4", "--metrics.tensorboard=false"])
    train(config)
    verb("inspect", "--sequences=1", "--cluster-tokens=0", "--examples=1", "--trust", str(RunDir(config).path))
    return RunDir(config).path


def mangle(raw: bytes, dice: random.Random, document: bool) -> bytes:
    """A file's bytes with one or a few things wrong. document: one JSON value, whose parts are replaced by odd ones too."""
    kind = dice.randrange(8 if document else 6)
    at = dice.randrange(len(raw))
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :]
    if kind == 2:
        return raw[:at] + dice.randbytes(dice.randrange(1, 40)) + raw[at:]
    if kind == 3:
        end = at + dice.randrange(200)
        return raw[:at] + raw[end:]
    if kind == 4:  # an odd value in place of a number
        numbers = [n for n in range(1, len(raw)) if raw[n : n + 1].isdigit() and not raw[n - 1 : n].isdigit()]
        start = dice.choice(numbers)
        end = next(
            (n for n in range(start, len(raw)) if not (raw[n : n + 1].isdigit() or raw[n : n + 1] in b".eE+-")),
            len(raw),
        )
        return raw[:start] + dice.choice(ODD).encode() + raw[end:]
    if kind == 5:
        return dice.choice([b"", b"\0" * 100, b"\xff\xfe", b"null", b"[]", b"{}", raw * 2])
    value = json.loads(raw)
    replace_one(value, dice)
    return json.dumps(value).encode()


def replace_one(value: object, dice: random.Random) -> None:
    """Replaces or deletes one part, at any depth, of a JSON value."""
    node = value
    while True:
        keys = [*node] if isinstance(node, dict) else [*range(len(node))] if isinstance(node, list) else []
        if not keys:
            return
        key = dice.choice(keys)
        inner = node[key]  # type: ignore[index]
        if isinstance(inner, dict | list) and inner and dice.random() < 0.8:
            node = inner
            continue
        if dice.random() < 0.3:
            del node[key]  # type: ignore[attr-defined]
        else:
            node[key] = dice.choice([None, True, -1, 10**300, 1e300, "x", "\ud83d", [], {}, [[]], 2**70])  # type: ignore[index]
        return


def outcome(action: Callable[[], object]) -> tuple[int, str]:
    """Runs an action in a fork of this process, bounded in time and memory: its status and what it wrote on stderr."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            os.dup2(writer, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - pytest's are not files
            torch.set_num_threads(1)  # the threads of the parent are not there
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # so that a busy machine changes nothing
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
            try:
                action()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    _, ended = os.waitpid(child, 0)
    return (os.waitstatus_to_exitcode(ended), text)


def whole_verb(reader: str, run: Path) -> None:
    options = ["--sequences=1", "--cluster-tokens=0", "--examples=0"] if reader == "inspect" else []
    sys.argv = ["titan-moe", reader, *options, str(run)]
    cli.main()


def only_reading(reader: str, run: Path) -> None:
    """What the verb does before it runs the model or draws."""
    try:
        if reader == "inspect":
            (checkpoint,), _ = from_checkpoint([run], False, [], 1)
            read_state(checkpoint, "checkpoint")
            damage(checkpoint, single(torch.device("cpu")))
        else:
            (read,) = read_runs([run])
            facts(read)
            summary([read])
            differences(read, read)
    except UserError as error:
        cli.fail(error, str(error), 2)
        sys.exit(2)


def check(run: Path, folder: Path, name: str, numbers: range, read: Callable[[str, Path], None]) -> list[str]:
    """Mangles one file in many ways. Returns what went wrong, a line each."""
    relative, reader = FILES[name]
    wrong = []
    copy = copied_run(run, folder)
    (copy / "inspect").mkdir()
    (copy / "inspect/step-00000004.json").write_bytes((run / "inspect/step-00000004.json").read_bytes())
    raw = (copy / relative).read_bytes()
    for number in numbers:
        mangled = mangle(raw, random.Random(f"{name} {number}"), document=relative.endswith(".json"))
        (copy / relative).write_bytes(mangled)
        if name == "state.json" and number % 2:
            sign((copy / relative).parent)  # someone who can write the file can make its checksum right
        status, errors = outcome(lambda: read(reader, copy))
        lines = errors.strip().splitlines()
        good = status == 0 or (
            status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1000
        )
        if not good:
            wrong.append(f"{name} {number}: status {status}: {lines[-1][:200] if lines else ''}")
        if name == "state.json":
            (copy / relative).write_bytes(raw)
            sign((copy / relative).parent)
    return wrong


@pytest.mark.parametrize("name", FILES)
def test_a_mangled_file_gives_one_line(run: Path, tmp_path: Path, name: str) -> None:
    assert check(run, tmp_path, name, range(4), whole_verb) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_mangled_file_gives_one_line(run: Path, tmp_path: Path, name: str) -> None:
    """2,000 in all. Most are only read: drawing takes a second each."""
    assert check(run, tmp_path, name, range(4, 20), whole_verb) == []
    assert check(run, tmp_path / "read", name, range(20, COUNT // len(FILES)), only_reading) == []


def test_the_whole_command_gives_one_line_too(run: Path, tmp_path: Path) -> None:
    """Not in a fork: as a user starts it."""
    copy = copied_run(run, tmp_path)
    (copy / "config.toml").write_text("")
    command = [sys.executable, "-m", "titan_moe.cli", "report", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {copy / 'config.toml'}: not a run's configuration: ")
