"""Text to tokenised shards, once: the results lie in a cache, keyed by corpus and tokenizer.

    ids of a document = bos, its pieces, eos

Validation documents are chosen by a hash of their text, so the same text never lands on both sides. A corpus of only a few
documents (one long file, say) is first cut at line ends.
"""

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from titan_moe.config.tables import Config
from titan_moe.data.corpora import Corpus, Document, open_corpus
from titan_moe.data.shards import FORMAT_VERSION, SPLITS, Manifest, ShardWriter, Split, read_manifest, write_manifest
from titan_moe.data.tokenizer import Tokenizer, read_tokenizer, train_tokenizer
from titan_moe.errors import UserError

FEW_DOCUMENTS = 20
CUT_CHARACTERS = 4096
BATCH_CHARACTERS = 1 << 21


class Prepared(NamedTuple):
    tokenizer: Tokenizer
    folder: Path
    manifest: Manifest


def cache_root(config: Config) -> Path:
    """Where tokenizers, shards and downloaded packages are kept."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir).expanduser()
    if os.environ.get("TITAN_MOE_CACHE"):
        return Path(os.environ["TITAN_MOE_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_moe"


def prepare(config: Config) -> Prepared:
    """The tokenizer and shards of a configuration, made if they aren't in the cache. Raises UserError."""
    root = cache_root(config)
    corpus = open_corpus(config.data.corpus, "data.corpus", root)
    try:
        tokenizer = cached_tokenizer(config, corpus, root)
        key = [corpus.fingerprint, tokenizer.fingerprint, config.data.tokens, config.data.validation_fraction]
        folder = root / "tokens" / digest(*key, FORMAT_VERSION)
        if not (folder / "manifest.json").exists():
            documents = split_documents(corpus, config.data.validation_fraction)
            make_shards(corpus, tokenizer, folder, documents, SPLITS, config.data.tokens or sys.maxsize)
    except OSError as error:
        place = error.filename or root
        raise UserError(f"data.cache_dir: {place}: can't be written: {error.strerror}") from error
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
        texts = (
            document.text
            for document, split in split_documents(corpus, config.data.validation_fraction)
            if split == "train"
        )
        model = train_tokenizer(texts, size)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_bytes(model)
        fresh.replace(path)
    return read_tokenizer(str(path), "data.cache_dir: the cached tokenizer")


def split_documents(corpus: Corpus, validation_fraction: float) -> Iterator[tuple[Document, str]]:
    """Every document with the split it belongs to. The first one always validates, so that any budget leaves some."""
    documents = corpus.documents()
    first = list(islice(documents, FEW_DOCUMENTS))
    everything: Iterator[Document] = chain(first, documents)
    if len(first) < FEW_DOCUMENTS:
        everything = (piece for document in first for piece in cut(document))
    opening: str | None = None
    for document in everything:
        if opening is None:
            opening = document.text
        validates = document.text == opening or hashed_share(document.text) < validation_fraction
        yield document, "validation" if validates else "train"


def hashed_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") / 2**64


def cut(document: Document) -> Iterator[Document]:
    """The document in pieces of about CUT_CHARACTERS, cut after line ends where there are any."""
    text, start = document.text, 0
    while start < len(text):
        end = start + CUT_CHARACTERS
        line_end = text.find("\n", end, end + CUT_CHARACTERS)
        end = line_end + 1 if line_end >= 0 else end
        yield Document(text[start:end], document.domain)
        start = end


def prepare_text(source: str, tokenizer: Tokenizer, root: Path) -> Prepared:
    """All of a text as the one split "text", with a tokenizer that there is. source: as data.corpus. Raises UserError."""
    corpus = open_corpus(source, "--text", root)
    folder = root / "tokens" / digest("text", corpus.fingerprint, tokenizer.fingerprint, FORMAT_VERSION)
    try:
        if not (folder / "manifest.json").exists():
            make_shards(corpus, tokenizer, folder, ((document, "text") for document in corpus.documents()), ("text",))
    except OSError as error:
        raise UserError(f"data.cache_dir: {error.filename or root}: can't be written: {error.strerror}") from error
    return Prepared(tokenizer, folder, read_manifest(folder))


def make_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    documents: Iterator[tuple[Document, str]],
    splits: tuple[str, ...],
    budget: int = sys.maxsize,
) -> None:
    """Tokenises documents, each with its split, into `folder`, which appears only when it is whole. budget: tokens of the
    first split after which no more are taken."""
    if not tokenizer.lossless:
        print(
            "Note: this tokenizer does not give every text back exactly (bits per byte count source bytes)",
            file=sys.stderr,
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    fresh.mkdir(exist_ok=True)
    try:
        write_manifest(fresh, write_splits(corpus, tokenizer, fresh, documents, splits, budget))
        with contextlib.suppress(OSError):  # another process may have been first; its shards are the same
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for reason in corpus.skipped[:3]:
        print(f"Skipped {reason}", file=sys.stderr)
    if corpus.skipped:
        print(f"Skipped {len(corpus.skipped)} unreadable file(s) in all", file=sys.stderr)


def remove_abandoned(parent: Path) -> None:
    """Deletes what a killed process left half made."""
    for path in parent.glob(".*.*"):
        owner = path.name.rsplit(".", 1)[-1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and Path("/proc").exists():
            shutil.rmtree(path, ignore_errors=True)


def write_splits(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    documents: Iterator[tuple[Document, str]],
    names: tuple[str, ...],
    budget: int,
) -> Manifest:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = {split: ShardWriter(folder, split, dtype) for split in names}
    domains: list[str] = []
    with tqdm(
        total=corpus.total_bytes,
        unit="B",
        unit_scale=True,
        desc=f"Tokenising {corpus.name}",
        disable=not sys.stderr.isatty(),
    ) as bar:
        for batch in batches(documents):
            ids = tokenizer.encode_batch([document.text for document, _ in batch], os.cpu_count() or 1)
            for (document, split), document_ids in zip(batch, ids, strict=True):
                if document.domain not in domains:
                    domains.append(document.domain)
                size = len(document.text.encode("utf-8"))
                bar.update(size)
                if writers[names[0]].tokens < budget:
                    whole = np.array([tokenizer.bos, *document_ids, tokenizer.eos], dtype=np.int64)
                    writers[split].add(whole, domains.index(document.domain), size)
            if writers[names[0]].tokens >= budget:
                break
    splits = {name: writer.finish() for name, writer in writers.items()}
    check_size(corpus, splits)
    fingerprint = digest(*(shard.sha256 for split in splits.values() for shard in split.shards))
    return Manifest(FORMAT_VERSION, corpus.name, tokenizer.fingerprint, dtype, domains, splits, fingerprint)


def check_size(corpus: Corpus, splits: dict[str, Split]) -> None:
    if sum(split.tokens for split in splits.values()) == 0:
        raise UserError(f"data.corpus: the corpus {corpus.name} is empty")
    for name, split in splits.items():
        if split.tokens < 3:
            raise UserError(f"data.corpus: {corpus.name} has too little text, nothing is left for {name}; give more")


def batches(documents: Iterator[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    """Documents in groups of about BATCH_CHARACTERS."""
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
