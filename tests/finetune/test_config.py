"""The configuration of `titan-moe finetune`, and its rows of text: what is taken and what is refused, in one line."""

import json
import re
from pathlib import Path

import pytest

from titan_moe.config.load import CONFIG_DIR, FINETUNE, all_keys, fields, is_table
from titan_moe.errors import UserError
from titan_moe.finetune.load import load_finetune
from titan_moe.finetune.rows import read_rows, split
from titan_moe.finetune.tables import finetune_class

SHIPPED = sorted(path.stem for path in CONFIG_DIR.glob(f"{FINETUNE}*.toml"))
NAMED = ["--model.path=model", "--data.train=a.jsonl"]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIR = {"prompt": "a", "completion": "b"}


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "mine.toml").write_text("")
    return str(tmp_path / "mine.toml")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_valid(name: str) -> None:
    config = load_finetune(name, [] if name != "finetune_lora" else NAMED)
    assert config.job.name == name


def test_shipped_configurations_have_the_papers_settings() -> None:
    qwen = load_finetune("finetune_qwen3_30b_a3b", [])
    weights = {name: table.weight for name, table in qwen.regularizers.options().items() if table.weight}
    assert weights == {"lb": 1e-3, "sp": 2e-4, "cp": 1e-4}
    assert (qwen.training.batch_size, qwen.training.epochs, qwen.data.seq_len) == (64, 3.0, 32768)
    assert (qwen.optimizer.lr, qwen.lora.rank) == (8e-5, 0)
    lora = load_finetune("finetune_deepseek_v2_lite", [])
    assert (lora.lora.rank, lora.lora.alpha, lora.lora.dropout) == (32, 128.0, 0.0)
    assert (lora.optimizer.lr, lora.training.batch_size, lora.training.epochs) == (1e-4, 32, 3.0)
    ling = load_finetune("finetune_ling_mini_2", [])
    assert ling.balancer.rate == 1e-3
    assert ling.regularizers.options()["lb"].weight == 0


MISTAKES = [
    ([], r"mine\.toml: model\.path = '': must be given: --model\.path="),
    (["--model.path=x"], r"data\.train = \[\]: must be given"),
    ([*NAMED, "--lora.rnk=4"], r"command line: unknown key lora\.rnk; did you mean lora\.rank"),
    ([*NAMED, "--lora.rank=many"], r"command line: lora\.rank = 'many': input should be a valid integer"),
    ([*NAMED, "--lora.rank=4", "--lora.dropout=0.1"], r"lora\.dropout = 0\.1: PEFT has dropout only on modules"),
    ([*NAMED, "--lora.merge=true"], r"lora\.merge = True: there are no adapters to merge"),
    (
        [*NAMED, "--training.batch_size=6", "--training.microbatch_size=4"],
        r"training\.batch_size = 6: must be a multiple of",
    ),
    (
        [*NAMED, "--data.validation=b", "--data.validation_fraction=0.1"],
        r"validation_fraction = 0\.1: data\.validation names",
    ),
    ([*NAMED, "--metrics.trackers=mine"], r"metrics\.trackers = \['mine'\]: there are wandb, trackio"),
    ([*NAMED, "--regularizers.sq.weight=1"], r"unknown key regularizers\.sq"),
    ([*NAMED, "--regularizers.sp.warmup_steps=3"], r"regularizers\.sp\.warmup_steps = 3: has no effect with weight 0"),
    ([*NAMED, "--job.name=../up"], r"job\.name = '\.\./up': is the name of a directory"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_one_line(words: list[str], message: str, config: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        load_finetune(config, words)
    assert "\n" not in str(found.value)


def test_dropout_is_taken_where_peft_has_it(config: str) -> None:
    off = [f"--lora.{part}=false" for part in ("feed_forward", "experts", "router")]
    assert load_finetune(config, [*NAMED, "--lora.rank=4", "--lora.dropout=0.1", *off]).lora.dropout == 0.1


def test_a_stored_configuration_of_a_stranger_needs_trust(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    stored = tmp_path / "run" / "config.toml"
    stored.write_text('[model]\npath = "/etc"\n[data]\ntrain = ["/etc/passwd"]\n')
    with pytest.raises(UserError, match=r"names files: model\.path = '/etc'"):
        load_finetune(str(stored), [])
    config = load_finetune(str(stored), [], trust=True)
    assert (config.job.output_dir, config.job.name) == (str(tmp_path), "run")


def test_every_option_has_a_help_text() -> None:
    table = finetune_class()
    assert "lora.rank" in all_keys(table)
    assert not [key for key, field in fields(table) if not is_table(field.annotation) and not field.description]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def test_rows_of_both_kinds(tmp_path: Path) -> None:
    chats = read_rows([write(tmp_path / "a", CHAT | {"source": "x"}, "", CHAT)], "data.train")
    assert (chats.kind, chats.conversational, chats.rows) == ("chat", True, [CHAT, CHAT])
    pairs = read_rows([write(tmp_path / "b", PAIR), write(tmp_path / "c", PAIR)], "data.train")
    assert (pairs.kind, pairs.conversational, len(pairs.rows)) == ("completion", False, 2)
    messages = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    assert read_rows([write(tmp_path / "d", messages)], "data.train").conversational


ROWS = [
    ("{", r"line 1: is no JSON"),
    ("[1]", r"line 1: is no object"),
    ({"text": "a"}, r"must have \"messages\", or \"prompt\" and \"completion\"; it has 'text'"),
    ({"prompt": "a", "completion": 3}, r"completion: must be a string"),
    ({"prompt": "a", "completion": ""}, r"completion: is empty"),
    ({"prompt": "a", "completion": CHAT["messages"]}, r"both be strings or both be lists"),
    ({"messages": []}, r"messages: must be a list of messages that is not empty"),
    ({"messages": [{"role": "user", "content": 1}]}, r"message 0 must have \"role\" and \"content\""),
    ({"messages": CHAT["messages"][:1]}, r"none of the role 'assistant'"),
]


@pytest.mark.parametrize(("row", "message"), ROWS, ids=[message[:30] for _, message in ROWS])
def test_wrong_rows_are_named(row: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError, match=message) as found:
        read_rows([path], "data.train")
    assert str(found.value).startswith(f"data.train = {path!r}: line 1: ")
    assert "\n" not in str(found.value)


def test_rows_of_two_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 2: is of another kind than the rows before it"):
        read_rows([write(tmp_path / "a", CHAT, PAIR)], "data.train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "can't be read: No such file"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: path.write_bytes(b"\xff\xfe\xff"), "is not UTF-8 text|can't be read"),
        (lambda path: path.write_text("\n\n"), "has no row"),
    ],
)
def test_files_that_can_not_be_read(make: object, message: str, tmp_path: Path) -> None:
    make(tmp_path / "a")  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as found:
        read_rows([str(tmp_path / "a")], "data.train")
    assert re.match(r"data\.train = '.*/a'", str(found.value))


def test_rows_for_validation_are_drawn_by_the_seed_and_not_trained_on(tmp_path: Path) -> None:
    rows = read_rows([write(tmp_path / "a", *({"prompt": "", "completion": str(n)} for n in range(20)))], "data.train")
    training, validation = split(rows, 0.25, seed=1)
    assert validation is not None
    assert (len(training.rows), len(validation.rows)) == (15, 5)
    assert sorted(int(row["completion"]) for row in training.rows + validation.rows) == list(range(20))
    assert split(rows, 0.25, seed=1)[1] == validation
    assert split(rows, 0.25, seed=2)[1] != validation
    with pytest.raises(UserError, match=r"validation_fraction = 0\.01: leaves 0 of 20 rows"):
        split(rows, 0.01, seed=0)
