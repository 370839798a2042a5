"""Tokenises a corpus into shards, once: a cache keeps them under a key of corpus and tokenizer.

    token ids of a document = bos, its pieces, eos

A hash of a document's text decides whether it is for training or validation, so the same text is never in both splits.
A corpus of fewer than 20 documents (one long file, for example) is first cut into pieces at line ends.
"""

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from titan_moe.config.checks import check_vocabulary
from titan_moe.config.tables import Config
from titan_moe.data.corpora import Corpus, Document, open_corpus
from titan_moe.data.shards import FORMAT_VERSION, SPLITS, Manifest, ShardWriter, Split, read_manifest, write_manifest
from titan_moe.data.tokenizer import Tokenizer, read_tokenizer, train_tokenizer
from titan_moe.errors import UserError

FEW_DOCUMENTS = 20
CUT_CHARACTERS = 4096
BATCH_CHARACTERS = 1 << 21

Documents: TypeAlias = Iterator[tuple[Document, str]]
"""Documents with the split that each belongs to."""


class Prepared(NamedTuple):
    tokenizer: Tokenizer
    folder: Path
    manifest: Manifest


def cache_root(config: Config) -> Path:
    """The directory of cached tokenizers, shards and downloaded packages."""
    chosen = config.data.cache_dir or os.environ.get("TITAN_MOE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_moe"


def prepare(config: Config, text: str = "", tokenizer: Tokenizer | None = None) -> Prepared:
    """The tokenizer and shards of a configuration, made unless the cache has them. Raises UserError.

    text: a corpus to tokenise in place of `data.corpus`, all of it as one split "text", with the same tokenizer.
    tokenizer: used in place of the one that the configuration names.
    """
    root, data = cache_root(config), config.data
    source = open_corpus(text, "--text", root) if text else open_corpus(data.corpus, "data.corpus", root)
    try:
        if tokenizer is None:
            corpus = open_corpus(data.corpus, "data.corpus", root) if text else source
            tokenizer = cached_tokenizer(config, corpus, root)
        check_vocabulary(config, tokenizer.vocab_size)
        key: list[object] = [source.fingerprint, tokenizer.fingerprint]
        key = ["text", *key] if text else [*key, data.tokens, data.validation_fraction]
        folder = root / "tokens" / digest(*key, FORMAT_VERSION)
        if not (folder / "manifest.json").exists():
            documents = (
                ((document, "text") for document in source.documents())
                if text
                else split_documents(source, data.validation_fraction)
            )
            splits, budget = (("text",), 0) if text else (SPLITS, data.tokens)
            make_shards(source, tokenizer, folder, documents, splits, budget or sys.maxsize)
    except OSError as error:
        raise UserError(f"data.cache_dir: {error.filename or root}: can't be written: {error.strerror}") from error
    return Prepared(tokenizer, folder, read_manifest(folder))


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def cached_tokenizer(config: Config, corpus: Corpus, root: Path) -> Tokenizer:
    if config.tokenizer.path:
        return read_tokenizer(config.tokenizer.path, "tokenizer.path")
    size = config.tokenizer.vocab_size
    path = root / "tokenizers" / f"{digest(corpus.fingerprint, size)}.model"
    if not path.exists():
        print(f"Training a tokenizer of {size} pieces on {corpus.name}", file=sys.stderr)
        documents = split_documents(corpus, config.data.validation_fraction)
        model = train_tokenizer((document.text for document, split in documents if split == "train"), size)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(
            f"{path.name}.{os.getpid()}"
        )  # renamed when complete, so that no other process reads a part
        fresh.write_bytes(model)
        fresh.replace(path)
    return read_tokenizer(str(path), "data.cache_dir: the cached tokenizer")


def split_documents(corpus: Corpus, validation_fraction: float) -> Documents:
    """All documents with their splits. The first is for validation, which thus has text under any token budget."""
    documents = corpus.documents()
    first = list(islice(documents, FEW_DOCUMENTS))
    everything: Iterator[Document] = chain(first, documents)
    if len(first) < FEW_DOCUMENTS:
        everything = (piece for document in first for piece in cut(document))
    first_text: str | None = None
    for document in everything:
        first_text = document.text if first_text is None else first_text
        validates = document.text == first_text or uniform_hash(document.text) < validation_fraction
        yield document, "validation" if validates else "train"


def uniform_hash(text: str) -> float:
    """A hash of the text, uniform in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") / 2**64


def cut(document: Document) -> Iterator[Document]:
    """Cuts a document into pieces of CUT_CHARACTERS to 2 * CUT_CHARACTERS, at a line end if one is in that range."""
    text, start = document.text, 0
    while start < len(text):
        end = start + CUT_CHARACTERS
        line_end = text.find("\n", end, end + CUT_CHARACTERS)
        end = line_end + 1 if line_end >= 0 else end
        yield Document(text[start:end], document.domain)
        start = end


def make_shards(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, documents: Documents, splits: tuple[str, ...], budget: int
) -> None:
    """Tokenises documents, each given with its split, into `folder`, which is created complete or not at all.

    budget: stop when the first split has this many tokens. Raises UserError for too little text.
    """
    if not tokenizer.lossless:
        print("Note: this tokenizer can't restore every text; bits per byte count bytes of the source", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    fresh.mkdir(exist_ok=True)
    try:
        write_manifest(fresh, write_splits(corpus, tokenizer, fresh, documents, splits, budget))
        with contextlib.suppress(OSError):  # another process may have made the same shards first
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for reason in corpus.skipped[:3]:
        print(f"Skipped {reason}", file=sys.stderr)
    if corpus.skipped:
        print(f"Skipped {len(corpus.skipped)} unreadable file(s) in all", file=sys.stderr)


def remove_abandoned(parent: Path) -> None:
    """Deletes the incomplete shards of killed processes, whose ids end the directory names."""
    for path in parent.glob(".*.*"):
        owner = path.name.rsplit(".", 1)[-1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and Path("/proc").exists():
            shutil.rmtree(path, ignore_errors=True)


def write_splits(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, documents: Documents, names: tuple[str, ...], budget: int
) -> Manifest:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = {split: ShardWriter(folder, split, dtype) for split in names}
    domains: list[str] = []
    bytes_read = 0
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"Tokenising {corpus.name}", total=corpus.total_bytes)
        for batch in batches(documents):
            ids = tokenizer.encode_batch([document.text for document, _ in batch], os.cpu_count() or 1)
            for (document, split), document_ids in zip(batch, ids, strict=True):
                if document.domain not in domains:
                    domains.append(document.domain)
                size = len(document.text.encode("utf-8"))
                bytes_read += size
                if writers[names[0]].tokens < budget:
                    with_ends = np.array([tokenizer.bos, *document_ids, tokenizer.eos], dtype=np.int64)
                    writers[split].add(with_ends, domains.index(document.domain), size)
            bar.update(task, completed=bytes_read)
            if writers[names[0]].tokens >= budget:
                break
    splits = {name: writer.finish() for name, writer in writers.items()}
    check_size(corpus, splits)
    fingerprint = digest(*(shard.sha256 for split in splits.values() for shard in split.shards))
    return Manifest(FORMAT_VERSION, corpus.name, tokenizer.fingerprint, dtype, domains, splits, fingerprint)


def check_size(corpus: Corpus, splits: dict[str, Split]) -> None:
    """Raises UserError where a split has no text."""
    if sum(split.tokens for split in splits.values()) == 0:
        raise UserError(f"data.corpus: the corpus {corpus.name} is empty")
    for name, split in splits.items():
        if split.tokens < 3:
            raise UserError(f"data.corpus: {corpus.name} has too little text, nothing is left for {name}; give more")


def batches(documents: Documents) -> Iterator[list[tuple[Document, str]]]:
    """Groups documents into lists of at least BATCH_CHARACTERS characters."""
    batch: list[tuple[Document, str]] = []
    size = 0
    for document, split in documents:
        batch.append((document, split))
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
