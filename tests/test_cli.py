"""The command line, run as a user runs it: real processes, real signals, real exit statuses."""

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import titan_moe.verbs as titan_moe_verbs
from tests.helpers.commands import ROOT, complaints, start, titan_moe, wait_for_step
from titan_moe.cli import VERBS, parse
from titan_moe.errors import UserError


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 128 + signal.SIGUSR1), (signal.SIGHUP, 129)],
)
def test_a_signal_saves_and_the_same_command_continues(
    tiny_options: list[str], tmp_path: Path, number: int, status: int
) -> None:
    command = ["train", *tiny_options, "--training.steps=400", "--checkpoint.interval=0", "--validation.interval=0"]
    process = start(*command)
    run = tmp_path / "runs" / "debug"
    wait_for_step(run, 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert not complaints(err)
    assert "the same command goes on from there" in out
    (saved,) = (run / "checkpoints").glob("step-*")
    step = int(saved.name[5:])
    again = titan_moe("train", *tiny_options, f"--training.steps={step + 2}", "--checkpoint.interval=0")
    assert again.returncode == 0, again.stderr
    assert f"Going on from {saved}" in again.stdout
    steps = [
        r["step"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "train"
    ]
    assert steps == list(range(1, step + 3))


def test_a_finished_run_says_so_and_how_to_continue(tiny_options: list[str]) -> None:
    assert titan_moe("train", *tiny_options).returncode == 0
    again = titan_moe("train", *tiny_options)
    assert again.returncode == 0
    assert "is finished: 6 steps" in again.stdout
    assert "--training.steps=12" in again.stdout
    assert "--job.name=debug-2" in again.stdout


def test_a_run_directory_admits_one_run_at_a_time(tiny_options: list[str], tmp_path: Path) -> None:
    longer = ["--training.steps=4000"]  # the first must still run when the second starts
    first = start("train", *tiny_options, *longer)
    wait_for_step(tmp_path / "runs" / "debug", 1, first)
    second = titan_moe("train", *tiny_options, *longer)
    assert second.returncode == 2
    assert "another process is training in" in second.stderr
    first.kill()
    first.communicate()
    assert titan_moe("train", *tiny_options).returncode == 0  # the lock ended with its process


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--training.stepz=1"], "training.steps"),
        (["--model.moe.top_k=99"], "model.moe.top_k = 99"),
        (["--config", "nothing_like_it"], "nothing_like_it"),
        (["--tokenizer.path=LICENSE"], "tokenizer.path = 'LICENSE': not a sentencepiece model"),
        (["--data.corpus=no/such/place"], "no/such/place"),
        (["--job.output_dir=/proc/nowhere"], "job.output_dir"),
        (["--data.cache_dir=/proc/nowhere"], "data.cache_dir"),
        (["--model.vocab_size=100"], "model.vocab_size = 100"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tiny_options: list[str], arguments: list[str], named: str) -> None:
    options = [o for o in tiny_options if o.split("=")[0] not in {a.split("=")[0] for a in arguments}]
    done = titan_moe("train", *options, *arguments, cwd=ROOT)
    lines = complaints(done.stderr)
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert named in lines[0]


def test_a_binary_corpus_and_a_damaged_shard_are_errors(tiny_options: list[str], tmp_path: Path) -> None:
    junk = tmp_path / "junk.txt"
    junk.write_bytes(os.urandom(5000))
    options = [o for o in tiny_options if not o.startswith("--data.c")]
    cache = f"--data.cache_dir={tmp_path / 'cache'}"
    done = titan_moe("train", *options, f"--data.corpus={junk}", cache)
    assert done.returncode == 2
    assert "junk.txt" in done.stderr.splitlines()[-1]
    corpus = next(o for o in tiny_options if o.startswith("--data.corpus"))
    assert titan_moe("train", *options, corpus, cache).returncode == 0
    shard = next((tmp_path / "cache" / "tokens").glob("*/train-00000.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    done = titan_moe("train", *options, corpus, cache, "--job.name=again")
    assert done.returncode == 2
    assert "train-00000.bin: damaged" in done.stderr


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_keeps_the_older_checkpoints(background: str, tiny_options: list[str], tmp_path: Path) -> None:
    """A limit on file size makes writes fail as a full disk does; older checkpoints stay as they are."""
    options = [*tiny_options, "--metrics.tensorboard=false", f"--checkpoint.async_save={background}"]
    assert titan_moe("train", *options, "--training.steps=2").returncode == 0
    checkpoints = tmp_path / "runs" / "debug" / "checkpoints"
    before = {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = titan_moe("train", *options, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "File too large" in line
    assert {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()} == before
    assert titan_moe("train", *options).returncode == 0


def test_plan_counts_parameters() -> None:
    done = titan_moe("plan", "--config", "medium.toml")
    assert done.returncode == 0
    assert "1,090,667,008" in done.stdout
    assert "99,762,688" in done.stdout


def test_prepare_prints_a_summary(tiny_options: list[str]) -> None:
    done = titan_moe("prepare", *tiny_options)
    assert done.returncode == 0
    assert "512 pieces" in done.stdout
    assert done.stdout.startswith("train ")


def test_help_lists_verbs_and_options() -> None:
    overview = titan_moe("--help")
    assert overview.returncode == 0
    assert "usage: titan-moe" in overview.stdout
    for verb, (_, meaning) in VERBS.items():
        assert re.search(rf"^ +{verb} +{meaning[:30]}", overview.stdout, re.MULTILINE)
    train = titan_moe("train", "--help")
    assert train.returncode == 0
    assert "--training.steps=" in train.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_has_usage_defaults_and_examples_that_parse(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse([verb, "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: titan-moe {verb} ")
    words = re.sub(r"\s+", " ", text)
    assert "(default: " in words or "options of the configuration, with their defaults" in words
    examples = re.findall(rf"^(?:examples?:)? +titan-moe ({verb} .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        assert parse(shlex.split(example)).run


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--version"])
    assert not end.value.code
    assert re.fullmatch(r"titan-moe \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_overview_imports_no_verb() -> None:
    code = "import sys, titan_moe.cli as cli\ntry:\n cli.parse(['-h'])\nexcept SystemExit:\n print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "'titan_moe.verbs.arguments'" in modules
    for slow in (
        "torch",
        "pydantic",
        "titan_moe.config",
        *(f"titan_moe.verbs.{module}" for module, _ in VERBS.values()),
    ):
        assert f"'{slow}'" not in modules


def test_a_new_verb_is_a_file_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "count.py").write_text(
        "def add_arguments(parser):\n    parser.add_argument('words', nargs='*')\n\n"
        "def run(arguments):\n    return len(arguments.words)\n"
    )
    monkeypatch.setattr("titan_moe.verbs.__path__", [*titan_moe_verbs.__path__, str(tmp_path)])
    monkeypatch.setitem(VERBS, "count", ("count", "count words"))
    arguments = parse(["count", "a", "b"])
    assert arguments.run(arguments) == 2


@pytest.mark.parametrize("override", [["--training.dtype", "float64"], ["--training.dtype=float64"]])
@pytest.mark.parametrize("position", range(5))
def test_an_override_may_stand_anywhere(override: list[str], position: int) -> None:
    words = ["runs/a", "--all", "runs/b", "--examples=3"]
    arguments = parse(["inspect", *words[:position], *override, *words[position:]])
    assert arguments.overrides == ["--training.dtype=float64"]
    assert (arguments.runs, arguments.all, arguments.examples) == ([Path("runs/a"), Path("runs/b")], True, 3)


MISTAKES = {
    "": "a verb is missing; there are train, prepare,",
    "trian": "no verb 'trian'; did you mean 'train'?",
    "nonsense": "no verb 'nonsense'; there are train, prepare,",
    "--config debug": "no verb '--config'",
    "train --conf debug": "command line: unknown option --conf; did you mean --config?",
    "train --chekc": "command line: unknown option --chekc; did you mean --check?",
    "train --steps=3": "command line: unknown option --steps; did you mean --training.steps?",
    "train --steps 3": "command line: unknown option --steps; did you mean --training.steps?",
    "train runs/debug": "command line: 'runs/debug' is not an option; options look like --section.key=value",
    "train training.steps=3": "command line: 'training.steps=3' is not an option; options look like --training.steps=3",
    "train --config": "argument --config: expected one argument; see `titan-moe train --help`",
    "train --training.steps": "command line: --training.steps needs a value: --training.steps=...",
    "train --training.steps --check": "command line: --training.steps needs a value: --training.steps=...",
    "train --check=yes": "argument --check: ignored explicit argument 'yes'; see `titan-moe train --help`",
    "plan --world=two": "--world = 'two': number of ranks to plan for, 1 or more",
    "plan --world 0": "--world = '0': number of ranks to plan for, 1 or more",
    "inspect": "the following arguments are required: RUN; see `titan-moe inspect --help`",
    "place runs/a runs/b": "command line: 'runs/b' is not an option",
    "report runs/a --training.steps=3": "command line: unknown option --training.steps",
    "report runs/a --outptu=x": "command line: unknown option --outptu; did you mean --output?",
    "sweep": "the following arguments are required: --config; see `titan-moe sweep --help`",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_on_the_command_line(words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(shlex.split(words))
    assert str(caught.value).startswith(MISTAKES[words])
    assert "\n" not in str(caught.value)


def test_an_unknown_verb_is_one_line_and_status_2() -> None:
    unknown = titan_moe("trian")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: no verb 'trian'; did you mean 'train'?\n"
