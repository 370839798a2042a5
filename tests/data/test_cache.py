"""The cache of tokenizers and shards: what is damaged is noticed and made anew, and processes do not disturb each other."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.helpers.commands import environment, titan_moe
from tests.helpers.privileges import without_privileges
from titan_moe.config.tables import Config, Data
from titan_moe.config.tables import Tokenizer as TokenizerTable
from titan_moe.data.prepare import Prepared, prepare
from titan_moe.data.shards import TokenStream
from titan_moe.errors import UserError
from titan_moe.runtime.owner import machine


def config_of(corpus: Path | str, cache: Path | str, path: str = "", pieces: int = 512, **data: Any) -> Config:
    table = Data(corpus=str(corpus), cache_dir=str(cache), **data)
    return Config(data=table, tokenizer=TokenizerTable(vocab_size=pieces, path=path))


def content(prepared: Prepared) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prepared.folder.iterdir() if path.name != "manifest.json"}


def test_a_flipped_bit_in_the_cached_tokenizer_is_named_and_it_is_trained_again(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(corpus_dir, tmp_path)
    good = prepare(config)
    (model,) = (tmp_path / "tokenizers").glob("*.model")
    for position in (0, 1000, -1):
        damaged = bytearray(good.tokenizer.model)
        damaged[position] ^= 1
        model.write_bytes(damaged)
        capsys.readouterr()
        assert prepare(config).tokenizer.model == good.tokenizer.model
        assert f"{model}: damaged" in capsys.readouterr().err
        assert model.read_bytes() == good.tokenizer.model


@pytest.mark.parametrize("damage", ["altered", "cut", "no JSON", "missing", "shard cut", "shard missing", "list cut"])
def test_damaged_shards_are_named_and_made_again(
    damage: str, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(corpus_dir, tmp_path)
    good = prepare(config)
    before = content(good)
    path = good.folder / ("manifest.json" if "shard" not in damage else "validation-00000.bin")
    path = good.folder / "train-documents.npy" if damage == "list cut" else path
    if damage == "altered":
        manifest = json.loads(path.read_text())
        manifest["splits"]["train"]["tokens"] //= 2
        path.write_text(json.dumps(manifest))
    elif "cut" in damage:
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "no JSON":
        path.write_text("junk")
    else:
        path.unlink()
    capsys.readouterr()
    again = prepare(config)
    assert str(path) in capsys.readouterr().err
    assert (again.manifest, content(again)) == (good.manifest, before)
    assert [p.name for p in (tmp_path / "tokens").iterdir()] == [good.folder.name]


def test_two_processes_prepare_the_same_text_at_once(corpus_dir: Path, tmp_path: Path) -> None:
    words = ["prepare", f"--data.corpus={corpus_dir}", f"--data.cache_dir={tmp_path}", "--tokenizer.vocab_size=512"]
    command = [sys.executable, "-m", "titan_moe.cli", *words]
    both = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert len(list((tmp_path / "tokens").iterdir())) == len(list((tmp_path / "tokenizers").iterdir())) == 1


def test_half_made_shards_of_others_stay_and_those_of_dead_processes_go(corpus_dir: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = tmp_path / "tokens"
    dead, elsewhere = (folder / f".a.{name}-{ended.pid}-01234567" for name in (machine(), "0123456789ab"))
    for path in (dead, elsewhere):
        path.mkdir(parents=True)
    prepared = prepare(config_of(corpus_dir, tmp_path))
    assert {path.name for path in folder.iterdir()} == {elsewhere.name, prepared.folder.name}


def test_moved_text_finds_its_shards(corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = tmp_path / "here" / "text", tmp_path / "there" / "text"
    here.parent.mkdir()
    there.parent.mkdir()
    here.mkdir()
    for path in sorted(corpus_dir.iterdir())[:25]:
        (here / path.name).write_bytes(path.read_bytes())
    first = prepare(config_of(here, tmp_path / "cache"))
    here.rename(there)
    capsys.readouterr()
    assert prepare(config_of(there, tmp_path / "cache"))[1:] == first[1:]
    assert capsys.readouterr().err == ""


def test_a_given_tokenizer_is_used_and_the_training_text_not_needed_for_other_text(
    corpus_dir: Path, tmp_path: Path
) -> None:
    first = prepare(config_of(corpus_dir, tmp_path / "one"))
    given = prepare(config_of(corpus_dir, tmp_path / "two"), tokenizer=first.tokenizer)
    assert given.tokenizer is first.tokenizer
    assert given.manifest == first.manifest
    assert not (tmp_path / "two" / "tokenizers").exists()
    (tmp_path / "new.txt").write_text("some new text")
    text = prepare(config_of("no/such/place", tmp_path / "two"), str(tmp_path / "new.txt"), first.tokenizer)
    stream = TokenStream(text.folder, text.manifest, "text")
    assert first.tokenizer.decode(stream.read(1, len(stream) - 1).tolist()) == "some new text"


def test_the_tokenizer_depends_on_the_configuration_and_not_on_earlier_runs(corpus_dir: Path, tmp_path: Path) -> None:
    """It is trained on the training split, so another validation fraction gives another one."""
    prepare(config_of(corpus_dir, tmp_path / "one", validation_fraction=0.5))
    after = prepare(config_of(corpus_dir, tmp_path / "one", validation_fraction=0.01))
    alone = prepare(config_of(corpus_dir, tmp_path / "two", validation_fraction=0.01))
    assert after.tokenizer.model == alone.tokenizer.model


def test_a_full_cache_is_read_without_permission_to_write_and_an_empty_one_is_one_line(open_folder: Path) -> None:
    (open_folder / "text.txt").write_text("".join(f"line {n} of some text\n" for n in range(3000)))
    cache, empty = open_folder / "cache", open_folder / "empty"
    config = config_of(open_folder / "text.txt", cache, pieces=300)
    first = prepare(config)
    empty.mkdir()
    for path in (*cache.rglob("*"), cache, empty):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with without_privileges():
        assert prepare(config).manifest == first.manifest
        with pytest.raises(UserError, match=rf"data\.cache_dir: {empty}.*Permission denied"):
            prepare(config_of(open_folder / "text.txt", empty, pieces=300))
    for path in (cache, empty, *cache.rglob("*")):
        path.chmod(0o755)


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_made(limit: int, corpus_dir: Path, tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ["prepare", f"--data.corpus={corpus_dir}", f"--data.cache_dir={tmp_path}", "--tokenizer.vocab_size=512"]
    done = titan_moe(*words, preexec_fn=limited)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("Training")]
    assert done.returncode == 2
    assert line.startswith("error: data.cache_dir: ")
    assert "File too large" in line
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name == "tokens"]
    assert titan_moe(*words).returncode == 0


def test_prepare_reports_what_was_read_and_left_out_also_from_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    rows = [json.dumps({"text": f"document {n} with some words in it"}) for n in range(60)]
    (folder / "a.jsonl").write_text("\n".join([*rows[:5], "{broken", *rows[5:], '{"text": ""}', '{"text": "\\ud83d"}']))
    (folder / ".hidden").write_text("x")
    os.mkfifo(folder / "fifo")
    words = [
        "prepare",
        f"--data.corpus={folder}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--tokenizer.vocab_size=300",
    ]
    first, again = titan_moe(*words), titan_moe(*words)
    assert (first.returncode, first.stdout) == (0, again.stdout), first.stderr
    assert again.stderr == ""
    for words in (
        "1 file, 63 rows, 61 documents, ",
        "left out: row is not JSON, 1 in all: a/a.jsonl:6 (",
        "left out: row has an empty text, 1 in all: a/a.jsonl:62",
        "left out: file is hidden, 1 in all: a/.hidden",
        "left out: not a regular file, 1 in all: a/fifo",
        "replaced by U+FFFD: 1 lone surrogate",
    ):
        assert words in first.stdout


def test_the_first_document_with_text_is_for_validation(tmp_path: Path) -> None:
    rows = ["", "", *(f"document {n} with some words in it" for n in range(40))]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    prepared = prepare(config_of(tmp_path / "a.jsonl", tmp_path / "cache", pieces=300, validation_fraction=1e-9))
    assert prepared.manifest.splits["validation"].documents == 1
    assert prepared.manifest.splits["validation"].source_bytes == len(rows[2])


def test_text_that_the_tokenizer_has_no_piece_for_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words here"] * 50),
        model_writer=model,
        vocab_size=20,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    (tmp_path / "a.txt").write_text("中文" * 5000)
    with pytest.raises(UserError, match=r"tokenizer\.path: the tokenizer has no piece for any character"):
        prepare(config_of(tmp_path / "a.txt", tmp_path / "cache", path=str(tmp_path / "t.model")))


@pytest.mark.parametrize("folder", ["a\0b", "/dev/null", "/proc/nowhere"])
def test_a_cache_that_cannot_be_is_one_line(folder: str, corpus_dir: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.cache_dir[^\n]*$"):
        prepare(config_of(corpus_dir, folder))
