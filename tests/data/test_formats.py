"""File formats: what is read from each, by name and by content, and what a bad row or a damaged file costs."""

import bz2
import gzip
import importlib.util
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from titan_moe.data import formats
from titan_moe.data.corpora import open_corpus
from titan_moe.data.files import Corpus
from titan_moe.data.formats import array_elements
from titan_moe.errors import UserError

ROWS = [{"text": f'row {n}, "quoted" é', "id": n} for n in range(3)]
TEXTS = [str(row["text"]) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    compressed: bytes = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    return compressed


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


def opened(path: Path, **options: str) -> Corpus:
    return open_corpus(str(path), "data.corpus", Path("unused"), **options)


def texts(path: Path, **options: str) -> list[str]:
    return [document.text for document in opened(path, **options).documents()]


JSON_FILES = {
    "a.jsonl": LINES,
    "PART.JSONL": LINES,
    "part.ndjson": LINES.replace(b"\n", b"\r\n"),
    "c4-train.00000-of-01024.json": LINES,
    "array.json": json.dumps(ROWS).encode(),
    "indented.json": b"\n " + json.dumps(ROWS, indent=2).encode() + b"\n",
    "part-00000": LINES,
    "mark.jsonl": b"\xef\xbb\xbf" + LINES,
    "mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "wide.jsonl": LINES.decode().encode("utf-16"),
    "wide": LINES.decode().encode("utf-16"),
    "wide.json": json.dumps(ROWS).encode("utf-32"),
}


@pytest.mark.parametrize("suffix", ["", *COMPRESSORS])
@pytest.mark.parametrize("name", list(JSON_FILES))
def test_json_rows_are_read_whatever_the_name_and_compression(tmp_path: Path, name: str, suffix: str) -> None:
    content = COMPRESSORS[suffix](JSON_FILES[name]) if suffix else JSON_FILES[name]
    path = tmp_path / (f"{name}.{suffix}" if suffix else name)
    path.write_bytes(content)
    assert texts(path) == TEXTS
    path.rename(tmp_path / name)  # compressed by content, not by name
    assert texts(tmp_path) == TEXTS


def test_an_empty_file_is_left_out_and_counted(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json", "c.txt", "d.jsonl.gz", "e"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "f.parquet")
    (tmp_path / "g.txt").write_text("good")
    corpus = opened(tmp_path)
    assert [document.text for document in corpus.documents()] == ["good"]
    assert corpus.report.left_out == {"file is empty": 6}


def test_one_object_is_one_row(tmp_path: Path) -> None:
    for number, indent in enumerate((None, 2)):
        (tmp_path / f"{number}.json").write_text(json.dumps(ROWS[0], indent=indent))
    assert texts(tmp_path) == [TEXTS[0]] * 2


def test_text_is_read_in_utf_8_16_and_32_and_line_ends_stay(tmp_path: Path) -> None:
    text = "Zeile eins\r\nné ▁\r\nlast\n"
    for number, encoding in enumerate(("utf-8", "utf-8-sig", "utf-16", "utf-32")):
        (tmp_path / f"{number}.txt").write_bytes(text.encode(encoding))
    (tmp_path / "4.py").write_bytes(b"\xfe\xff" + text.encode("utf-16-be"))
    (tmp_path / "5.TXT.GZ").write_bytes(gzip.compress(text.encode()))
    assert texts(tmp_path) == [text] * 6


def test_a_txt_file_is_text_even_if_it_looks_like_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(LINES)
    corpus = opened(tmp_path)
    assert [document.text for document in corpus.documents()] == [LINES.decode()]
    assert any("a.txt holds JSON lines" in line for line in corpus.report.lines())


BAD_ROWS = {
    "null": b'{"text": null}',
    "number": b'{"text": 5}',
    "other key": b'{"body": "x"}',
    "no object": b'["text"]',
    "string": b'"text"',
    "not JSON": b"{broken",
    "digits": b'{"n": ' + b"9" * 5000 + b', "text": "x"}',
    "depth": b"[" * 100_000,
    "closed depth": b"[" * 100_000 + b"]" * 100_000,
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "NUL": b"\0\0\0",
}


@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize("kind", list(BAD_ROWS))
def test_a_bad_line_is_left_out_and_named(tmp_path: Path, kind: str, where: int) -> None:
    lines = LINES.splitlines()
    lines.insert(where, BAD_ROWS[kind])
    for suffix in ("jsonl", "ndjson"):
        (tmp_path / f"a.{suffix}").write_bytes(b"\n".join(lines) + b"\n")
    corpus = opened(tmp_path)
    assert [document.text for document in corpus.documents()] == TEXTS * 2
    assert (corpus.report.rows, sum(corpus.report.left_out.values())) == (8, 2)
    (examples,) = corpus.report.examples.values()
    assert [place.split(" ")[0] for place in examples] == [
        f"{tmp_path.name}/a.{s}:{where + 1}" for s in ("jsonl", "ndjson")
    ]


@pytest.mark.parametrize("kind", [kind for kind in BAD_ROWS if kind not in ("depth", "not JSON")])
def test_a_bad_element_of_an_array_is_left_out_and_named(tmp_path: Path, kind: str) -> None:
    elements = [json.dumps(row).encode() for row in ROWS]
    elements.insert(1, BAD_ROWS[kind])
    (tmp_path / "a.json").write_bytes(b"[" + b",\n".join(elements) + b"]")
    corpus = opened(tmp_path)
    assert [document.text for document in corpus.documents()] == TEXTS
    (examples,) = corpus.report.examples.values()
    assert examples[0].startswith(f"{tmp_path.name}/a.json:2")


def test_an_array_that_breaks_off_costs_its_last_element(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS)[:-5])
    corpus = opened(tmp_path)
    assert [document.text for document in corpus.documents()] == TEXTS[:2]
    assert corpus.report.left_out == {"row is not JSON": 1}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(json_values, max_size=6), indent=st.sampled_from([None, 0, 3]), escape=st.booleans())
def test_elements_of_any_array_are_told_apart(values: list[Any], indent: int | None, escape: bool) -> None:
    source = json.dumps(values, indent=indent, ensure_ascii=escape)
    assert [json.loads(element) for element in array_elements(source)] == values


def test_bad_rows_of_parquet_are_left_out(tmp_path: Path) -> None:
    raw = pyarrow.array([b"one", None, b"\xff\xfe", b"four", b""], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())  # a string column with invalid UTF-8
    parquet.write_table(pyarrow.table({"text": column, "id": range(5)}), tmp_path / "A.Parquet")
    corpus = opened(tmp_path)
    assert [document.text for document in corpus.documents()] == ["one", "four"]
    assert corpus.report.rows == 5
    places = [place.split(" ")[0].rsplit(":", 1)[1] for places in corpus.report.examples.values() for place in places]
    assert sorted(places) == ["2", "3", "5"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_text_under_another_name_is_read_with_text_column_and_else_named(tmp_path: Path, name: str) -> None:
    rows = [{"content": text, "id": n} for n, text in enumerate(TEXTS)]
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    assert texts(tmp_path, text_column="content") == TEXTS
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"content, id; data\.text_column"):
            texts(path)


def test_a_file_that_is_no_json_says_so(tmp_path: Path) -> None:
    for name in ("prose.jsonl", "prose.json"):
        (tmp_path / name).write_text("Some prose.\nMore of it.\n")
        with pytest.raises(UserError, match=rf"{name}: file is not JSON"):
            texts(tmp_path / name)


@pytest.mark.parametrize("suffix", list(COMPRESSORS))
def test_a_damaged_compressed_file_is_named_and_what_precedes_the_damage_is_used(tmp_path: Path, suffix: str) -> None:
    many = b"".join(json.dumps({"text": f"row {n} {n * 7919 % 1000003}"}).encode() + b"\n" for n in range(10_000))
    whole = COMPRESSORS[suffix](many)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.txt").write_text("good")
    corpus = opened(tmp_path)
    found = [document.text for document in corpus.documents()]
    assert found[-1] == "good"
    assert len(found) < 10_000
    assert corpus.report.left_out["file is damaged from some point on"] == 1
    with pytest.raises(UserError, match="damaged"):
        texts(tmp_path / f"a.jsonl.{suffix}")


def test_archives_are_named(tmp_path: Path) -> None:
    for name, content in {"a.zip": b"PK\x03\x04" + bytes(40), "b.tar": b"x" * 257 + b"ustar" + bytes(300)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: file is a \w+ archive; unpack it"):
            texts(tmp_path / name)


def test_rows_and_files_beyond_the_limits_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_ROW", 1000)
    monkeypatch.setattr(formats, "LARGEST_UNPACKED", 5000)
    monkeypatch.setattr(formats, "LARGEST_FILE", 8000)
    long_row = json.dumps({"text": "x" * 10_000}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(LINES + long_row + LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(long_row + LINES))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x" * 5001))
    (tmp_path / "d.txt").write_bytes(b"x" * 8001)
    (tmp_path / "e.txt").write_bytes(b"x" * 8000)
    (tmp_path / "f.json").write_bytes(json.dumps(ROWS * 200).encode())
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress(b"x" * 5000))
    corpus = opened(tmp_path)
    assert [document.text for document in corpus.documents()] == [*TEXTS * 3, "x" * 8000, "x" * 5000]
    assert sum(corpus.report.left_out.values()) == 5
    assert [place for places in corpus.report.examples.values() for place in places] == [
        f"{tmp_path.name}/{name}" for name in ("a.jsonl:4", "b.jsonl.gz:1", "c.txt.gz", "d.txt", "f.json")
    ]


def test_zstd_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: zstd files need .* \(.* -m pip install zstandard\)"):
        texts(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("zstandard") is None, reason="needs zstandard")
def test_zstd_frames_one_after_the_other_are_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"one ") + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstd(b"") + zstd(b"two"))
    assert texts(tmp_path) == ["one two"]
