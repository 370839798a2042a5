"""The command line in environments that are not its author's: encodings, no home, a reader that goes, little memory."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import complaints, environment, start, titan_moe
from titan_moe.cli import VERBS, parse
from titan_moe.errors import UserError
from titan_moe.verbs.arguments import directory_argument, file_argument, path_argument

COMMAND = [sys.executable, "-m", "titan_moe.cli"]
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII for texts": {"PYTHONIOENCODING": "ascii"},
}


@pytest.mark.parametrize("locale", LOCALES)
def test_names_that_are_not_ascii_in_every_locale(locale: str, tiny_options: list[str], tmp_path: Path) -> None:
    words = [*tiny_options, "--training.steps=1", "--validation.interval=0", "--metrics.tensorboard=false"]
    command = [*COMMAND, "train", *words, "--job.name=é"]
    done = subprocess.run(command, capture_output=True, env=environment() | LOCALES[locale], timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "é" / "config.toml").exists()


NOBODY = ["setpriv", "--reuid=54321", "--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--"]


@pytest.mark.skipif(
    subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("setpriv")
    else True,
    reason="needs root and setpriv, to run as a user whom /etc/passwd does not list",
)
@pytest.mark.parametrize("cache", ["--data.cache_dir=cache", "--data.cache_dir=", "--data.cache_dir=~/cache"])
def test_no_home_and_no_user_name(cache: str, tiny_options: list[str], tmp_path: Path) -> None:
    """A container that runs as some number. It may read and write here, as that is not what is tested."""
    options = [word for word in tiny_options if not word.startswith("--data.cache_dir=")]
    options += [cache, "--training.steps=1", "--validation.interval=0"]
    without = ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "XDG_CACHE_HOME", "TITAN_MOE_CACHE")
    variables = {name: value for name, value in environment().items() if name not in without}
    variables["TMPDIR"] = str(tmp_path)
    command = [*NOBODY, *COMMAND, "train", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=120, check=False
    )
    if "~" in cache:
        assert done.returncode == 2
        assert "data.cache_dir = '~/cache': no home directory is known" in complaints(done.stderr)[-1]
    else:
        assert done.returncode == 0, done.stderr
        assert "caches are in" in done.stderr
        assert (tmp_path / "titan_moe-54321").stat().st_mode & 0o777 == 0o700


def test_a_cache_directory_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    """Whoever may write there could leave programs that this user would run."""
    other = tmp_path / f"titan_moe-{os.getuid()}"
    other.mkdir(mode=0o777)
    other.chmod(0o777)
    code = (
        "import os; os.path.expanduser = lambda path: path; from titan_moe.runtime.home import provide_cache; "
        "provide_cache(); print(os.environ['XDG_CACHE_HOME'])"
    )
    variables = {name: value for name, value in environment().items() if name != "XDG_CACHE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=variables | {"TMPDIR": str(tmp_path)},
        check=True,
    )
    used = Path(done.stdout.strip())
    assert used != other
    assert used.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("words", [["plan"], ["plan", "--help"], ["train", "--help"], ["--help"]], ids=" ".join)
def test_a_reader_that_goes_ends_a_command_without_a_word(words: list[str]) -> None:
    """stdout is a pipe that nobody reads any more, as after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen([*COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, env=environment())
    os.close(writer)
    _, errors = process.communicate(timeout=120)
    assert errors == b""
    assert process.returncode == (0 if words[-1] == "--help" else 128 + signal.SIGPIPE)  # argparse hides it


def test_a_reader_that_goes_stops_a_training_run_which_saves(tiny_options: list[str], tmp_path: Path) -> None:
    process = start("train", *tiny_options, "--training.steps=100000", "--checkpoint.interval=0")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 128 + signal.SIGHUP
    assert not complaints(errors)
    assert list((tmp_path / "runs" / "debug" / "checkpoints").glob("step-*"))


def test_too_little_memory_is_one_line(tiny_options: list[str]) -> None:
    limit = 8 << 30

    def few_gigabytes() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    words = [*tiny_options, "--model.vocab_size=200000000", "--metrics.tensorboard=false"]
    done = titan_moe("train", *words, preexec_fn=few_gigabytes)
    assert done.returncode == 2, done.stderr
    (line,) = complaints(done.stderr)
    assert re.match(r"error: out of memory \(.*\); lower training\.microbatch_size", line)


def test_paths_that_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_argument("~/x") == tmp_path / "x"
    assert parse(["report", "~/run", "--output=~/page"]).output == tmp_path / "page"
    assert parse(["place", "~/run", "--output=~/order.json"]).runs == tmp_path / "run"
    (tmp_path / "file").touch()
    assert file_argument(str(tmp_path / "file")) == tmp_path / "file"  # is written anew
    assert directory_argument(str(tmp_path / "new" / "er")) == tmp_path / "new" / "er"
    for wrong in (lambda: file_argument(str(tmp_path)), lambda: directory_argument(str(tmp_path / "file" / "below"))):
        with pytest.raises(UserError, match="--output = "):
            wrong()


@pytest.mark.parametrize("verb", VERBS)
def test_help_wins_over_other_words(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([verb, "-h"], [verb, "--help", "--job.name=x"]):
        with pytest.raises(SystemExit) as end:
            parse(words)
        assert not end.value.code
        assert capsys.readouterr().out.startswith(f"usage: titan-moe {verb}")


@pytest.mark.parametrize("value", ["x", "0", "²", "1" * 5000])
def test_a_sweeps_number_of_processes(value: str) -> None:
    command = [*COMMAND, "sweep", "--config", "nano"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | {"NPROC": value}, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: environment: NPROC = ")


def test_weights_that_a_step_has_destroyed_are_one_line(tiny_options: list[str]) -> None:
    """The step itself is finite, and the validation after it is not."""
    done = titan_moe(
        "train", *tiny_options, "--training.steps=1", "--optimizer.lr=1e300", "--lr_scheduler.warmup_steps=0"
    )
    assert done.returncode == 1
    (line,) = complaints(done.stderr)
    assert re.match(
        r"error: validation after step 1: the cross-entropy is not finite, there is no checkpoint yet", line
    )
