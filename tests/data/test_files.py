"""Which files of a folder are read, what happens to those that can't be, and what identifies their text."""

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.privileges import without_privileges
from titan_moe.config import extensions
from titan_moe.data import digests
from titan_moe.data.corpora import open_corpus, stdlib
from titan_moe.data.digests import sha256
from titan_moe.data.files import Corpus
from titan_moe.errors import UserError
from titan_moe.extend import Document, register_corpus


def opened(path: Path | str, cache: Path = Path("unused")) -> Corpus:
    return open_corpus(str(path), "data.corpus", cache)


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents()]


def test_hidden_files_links_to_folders_and_what_is_no_file_are_left_out_and_counted(tmp_path: Path) -> None:
    root = tmp_path / ".corpus" / "a"  # a hidden folder above what the user named does not count
    (root / ".git").mkdir(parents=True)
    (root / "sub").mkdir()
    for name in (".git/HEAD", ".hidden.txt", "b.txt", "sub/c.txt"):
        (root / name).write_text(name)
    (root / "sub" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "nowhere").symlink_to(root / "nothing")
    (root / "z-link.txt").symlink_to(root / "b.txt")
    os.mkfifo(root / "fifo")
    corpus = opened(root)
    assert texts(corpus) == ["b.txt", "sub/c.txt", "b.txt"]
    assert corpus.report.left_out == {
        "folder is hidden": 1,
        "file is hidden": 1,
        "not a regular file": 1,
        "link leads nowhere": 2,
        "folder is a link": 1,
    }
    assert corpus.report.examples["folder is a link"] == ["a/sub/loop"]


def test_what_the_user_named_must_be_a_file_or_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(UserError, match="neither a regular file nor a folder"):
            opened(path)
    for name in ("", [], [""], "no\0such", "x" * 300, "~nobody-of-this-name/x"):
        with pytest.raises(UserError, match=r"data\.corpus"):
            open_corpus(name, "data.corpus", Path("unused"))


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert texts(opened("~/a.txt")) == ["at home"]


def test_a_file_without_permission_stops_if_named_and_is_left_out_in_a_folder(open_folder: Path) -> None:
    (open_folder / "a.txt").write_text("secret")
    (open_folder / "b.txt").write_text("public")
    (open_folder / "c").mkdir()
    (open_folder / "a.txt").chmod(0)
    (open_folder / "c").chmod(0)
    with without_privileges():
        corpus = opened(open_folder)
        assert texts(corpus) == ["public"]
        assert list(corpus.report.examples.values()) == [[f"{open_folder.name}/c"], [f"{open_folder.name}/a.txt"]]
        with pytest.raises(UserError, match=r"a\.txt: can't be read: Permission denied"):
            opened(open_folder / "a.txt")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails with EIO")
def test_an_input_error_stops(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"b\.txt: can't be read: Input/output error"):
        opened(tmp_path)


def test_a_file_name_that_is_not_utf_8_can_be_reported(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n"))
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "x"}\n{}\n')
    corpus = opened(folder)
    (document,) = corpus.documents()
    assert document.domain == "\\udcff\\n"
    "\n".join(corpus.report.lines()).encode("utf-8")
    assert len(corpus.report.lines()) == 2


def test_the_same_text_elsewhere_is_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "one" / "data").mkdir(parents=True)
    (tmp_path / "one" / "data" / "a.txt").write_text("some text")
    (tmp_path / "one" / "data" / "b.jsonl").write_text('{"text": "x"}\n')
    first = opened(tmp_path / "one" / "data").fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "data" / "a.txt").rename(tmp_path / "two" / "data" / "0.txt")
    os.utime(tmp_path / "two" / "data" / "b.jsonl", (1, 1))
    assert opened(tmp_path / "two" / "data").fingerprint == first
    (tmp_path / "two" / "data" / "b.jsonl").rename(tmp_path / "two" / "data" / "b.txt")  # read in another way
    assert opened(tmp_path / "two" / "data").fingerprint != first


def test_the_index_of_checksums_saves_reading_and_notices_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "text", tmp_path / "cache"
    folder.mkdir()
    path = folder / "a.txt"
    path.write_text("some text")
    old = path.stat().st_mtime_ns - 10**10
    os.utime(path, ns=(old, old))
    read: list[Path] = []
    monkeypatch.setattr(digests, "sha256", lambda path: [read.append(path), sha256(path)][1])

    def fingerprint() -> str:
        read.clear()
        corpus = opened(folder, cache)
        corpus.save_digests()
        return corpus.fingerprint

    first = fingerprint()
    assert (fingerprint(), read) == (
        first,
        [path],
    )  # it may change again within a tick of the clock, so it is read again
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", 0)
    assert (fingerprint(), read) == (first, [path])
    assert (fingerprint(), read) == (first, [])
    path.write_text("same size")
    os.utime(path, ns=(old, old))
    assert fingerprint() != first
    index = next((cache / "digests").iterdir())
    index.write_bytes(index.read_bytes().replace(b"1", b"2", 1))
    read.clear()
    assert (fingerprint() != first, read) == (True, [path])


def test_a_file_that_changes_while_it_is_read_stops(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 3)
    documents = opened(tmp_path / "a.jsonl").documents()
    next(documents)
    (tmp_path / "a.jsonl").write_text('{"text": "changed"}\n' * 3)
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read"):
        list(documents)


def test_stdlib_is_identified_by_content_and_a_registered_corpus_by_its_code(tmp_path: Path) -> None:
    assert stdlib(tmp_path).fingerprint == stdlib(tmp_path).fingerprint
    found = []
    for text in ("one", "two", "two"):
        module = tmp_path / "mine.py"
        module.write_text(f"def documents():\n    yield {text!r}\n")
        space: dict[str, object] = {}
        exec(compile(module.read_text(), str(module), "exec"), space)
        register_corpus("mine", space["documents"])  # type: ignore[arg-type]
        found.append(open_corpus("mine", "data.corpus", tmp_path).fingerprint)
    del extensions.corpora["mine"]
    assert found[0] != found[1] == found[2]


def test_lone_surrogates_are_replaced_and_documents_without_text_left_out() -> None:
    documents = [Document("half \ud83d here"), Document(""), Document(None), Document("\ude00\ud83d \ufffd")]  # type: ignore[arg-type]
    register_corpus("odd", lambda: iter(documents))
    corpus = opened("odd")
    del extensions.corpora["odd"]
    assert texts(corpus) == ["half \ufffd here", "\ufffd\ufffd \ufffd"]
    assert (corpus.report.replaced, corpus.report.left_out) == (3, {"document without text": 2})
