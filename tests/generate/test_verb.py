"""`titan-moe generate`, run as a user runs it."""

import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, environment, start, titan_moe
from tests.helpers.runs import DEEPSEEK, train
from tests.helpers.strangers import verb
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import load_config
from titan_moe.errors import UserError

LONG = ["--max-tokens", "100000", "--temperature", "1.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> Path:
    """The directory of a short run with shared experts, sigmoid scores and a balancing bias."""
    places = [f"--data.corpus={corpus_dir}", f"--data.cache_dir={cache_dir}"]
    folder = tmp_path_factory.mktemp("runs")
    config = load_config("debug", [*TINY, *DEEPSEEK, *places, f"--job.output_dir={folder}"])
    train(config)
    return RunDir(config).path


def test_texts_go_to_stdout_in_the_order_of_the_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(run), "--max-tokens=6", "--seed=3"]
    alone = []
    for prompt in ("import", "class A"):
        assert verb(*words, "--prompt", prompt) == 0
        alone.append(capsys.readouterr().out)
    assert verb(*words, "--prompt", "import", "--prompt", "class A") == 0
    out, err = capsys.readouterr()
    assert out == "".join(alone)
    assert err == "--- 1: 'import'\n--- 2: 'class A'\n"
    checkpoint = max((run / "checkpoints").glob("step-*"))
    assert verb("generate", str(checkpoint), "--prompt=import", "--tokens=6", "--seed=3") == 0
    assert capsys.readouterr().out == alone[0]


def test_interactive_answers_every_line(run: Path) -> None:
    words = ["generate", str(run), "--interactive", "--tokens=3", "--temperature=0"]
    done = titan_moe(*words, input="import\nclass\n")
    wanted = titan_moe("generate", str(run), "--tokens=3", "--temperature=0", "--prompt=import", "--prompt=class")
    assert done.returncode == 0, done.stderr
    assert done.stdout == wanted.stdout != ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompt: none is given"),
        (["--prompt=a", "--top-p=0"], "--top-p = '0'"),
        (["--prompt=a", "--top-p=2"], "give a number above 0, at most 1"),
        (["--prompt=a", "--min-p=5"], "give a number from 0 to 1"),
        (["--prompt=a", "--tokens=0"], "--max-tokens = '0': new tokens per prompt, at most, 1 or more"),
        (["--prompt=a", "--temperature=nan"], "--temperature = 'nan'"),
        (["--prompt=a", "--stop="], "--stop = ''"),
        (["--prompt=a\udcff"], "--prompt = 'a\\udcff': is not UTF-8"),
        (["--prompt=a", "--parallelism.tp=2"], "parallelism"),
    ],
)
def test_a_mistake_is_one_line(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        verb("generate", str(run), *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a checkpoint nor a run directory"):
        verb("generate", str(tmp_path), "--prompt=a")


def test_ctrl_c_ends_the_line_and_has_status_130(run: Path) -> None:
    process = start("generate", str(run), *(["--prompt=import"] * 16), *LONG)
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out.endswith("\n")
    assert "Traceback" not in err


def test_a_closed_stdout_is_quiet(run: Path) -> None:
    process = start("generate", str(run), *(["--prompt=import"] * 8), *LONG)
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0]
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 141
    assert [line for line in err.splitlines() if not line.startswith("---")] == []


def test_a_terminal_gets_no_control_characters() -> None:
    """A reader on a pseudo-terminal; a pipe gets the bytes as they are."""
    code = (
        "from titan_moe.generate.terminal import write_pieces as w\n"
        "from titan_moe.generate.loop import Piece\n"
        "w(iter([Piece(0, 'a\\x1b[31m\\tb\\x07', 1, 'eos')]), ['p'])"
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code]
    subprocess.run(command, stdout=theirs, check=True, env=environment(), timeout=60)
    assert select.select([ours], [], [], 10)[0]
    assert os.read(ours, 100).replace(b"\r", b"") == b"a\\x1b[31m\tb\\x07\n"
    os.close(ours)
    os.close(theirs)
    piped = subprocess.run(command, capture_output=True, check=True, env=environment(), timeout=60)
    assert piped.stdout == b"a\x1b[31m\tb\x07\n"
