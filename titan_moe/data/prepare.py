"""Tokenises a corpus into shards, once: a cache keeps them under a key of corpus and tokenizer.

    token ids of a document = bos, its pieces, eos

A hash of a document's text decides whether it is for training or validation, so the same text is never in both splits.
A corpus of fewer than 20 documents (one long file, for example) is first cut into pieces at line ends.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from titan_moe.config.checks import check_vocabulary
from titan_moe.config.tables import Config
from titan_moe.data.corpora import Document, open_corpus
from titan_moe.data.files import Corpus
from titan_moe.data.needs import HUB_CORPORA
from titan_moe.data.shards import (
    FORMAT_VERSION,
    SPLITS,
    DamagedShards,
    Manifest,
    ShardWriter,
    Split,
    read_manifest,
    write_manifest,
)
from titan_moe.data.tokenizer import Tokenizer, read_tokenizer, train_tokenizer
from titan_moe.errors import UserError
from titan_moe.runtime.cpus import available_cpus
from titan_moe.runtime.home import cache_folder
from titan_moe.runtime.owner import fresh_path, making_folder, remove, remove_abandoned, replacing, touch
from titan_moe.runtime.terminal import shows_bars

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
    """The directory of cached tokenizers, shards and downloaded packages. Raises UserError."""
    chosen = config.data.cache_dir
    origin, path = ("data.cache_dir", chosen) if chosen else ("TITAN_MOE_CACHE", os.environ.get("TITAN_MOE_CACHE", ""))
    if "\0" in path:
        raise UserError(f"{origin} = {path!r}: a path can't have a NUL character")
    try:
        return Path(chosen).expanduser() if chosen else cache_folder()
    except RuntimeError as error:  # the home directory of `~` or `~name` is unknown
        raise UserError(f"{origin} = {path!r}: {error}") from error


def prepare(config: Config, text: str = "", tokenizer: Tokenizer | None = None, quiet: bool = False) -> Prepared:
    """The tokenizer and shards of a configuration, made unless the cache has them. Raises UserError.

    text: a corpus to tokenise in place of `data.corpus`, all of it as one split "text", with the same tokenizer.
    tokenizer: used in place of the configuration's. quiet: when shards are made, do not print what was left out of them.
    """
    root, data = cache_root(config), config.data
    try:
        source = open_corpus(text or data.corpus, "--text" if text else "data.corpus", root, data.text_column)
        opened = [source]
        if tokenizer is None and config.tokenizer.path:
            tokenizer = read_tokenizer(config.tokenizer.path, "tokenizer.path")
        if tokenizer is None:
            if text:
                opened.append(open_corpus(data.corpus, "data.corpus", root, data.text_column))
            tokenizer = trained_tokenizer(config, opened[-1], root)
        check_vocabulary(config, tokenizer.vocab_size)
        key: list[object] = [source.fingerprint, tokenizer.fingerprint]
        budget = 0 if text else token_budget(config)
        key = ["text", *key] if text else [*key, budget, data.validation_fraction]
        folder = root / "tokens" / digest(*key, FORMAT_VERSION)
        if usable(folder):
            remember(opened)
            return Prepared(tokenizer, folder, read_manifest(folder))
        for corpus in opened:
            corpus.save_digests()
        splits = ("text",) if text else SPLITS
        documents = (
            ((document, "text") for document in source.documents())
            if text
            else split_documents(source, data.validation_fraction)
        )
        make_shards(source, tokenizer, folder, documents, splits, budget or sys.maxsize)
        manifest = read_manifest(folder)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {error.filename or root}: {error.strerror}; make room, or choose another with data.cache_dir"
        ) from error
    if not quiet:
        print("\n  ".join([f"Read {manifest.report[0]}", *manifest.report[1:]]), file=sys.stderr)
    return Prepared(tokenizer, folder, manifest)


def token_budget(config: Config) -> int:
    """Training tokens to prepare; 0: all of the corpus. Of one from a hub, larger than a disk, what the run reads."""
    training = config.training
    if config.data.tokens or config.data.corpus not in HUB_CORPORA:
        return config.data.tokens
    return training.steps * training.batch_size * training.seq_len


def remember(corpora: list[Corpus]) -> None:
    """Writes what identifies the text into the cache. A cache that can't be written may still be read."""
    try:
        for corpus in corpora:
            corpus.save_digests()
    except OSError as error:
        print(
            f"Note: {error.filename}: {error.strerror}; so every start reads all text for its checksums",
            file=sys.stderr,
        )


def usable(folder: Path) -> bool:
    """Whether a folder has complete shards. Damaged ones are named and deleted, so that they can be made again."""
    if not folder.exists():
        return False
    try:
        read_manifest(folder)
    except DamagedShards as error:
        print(f"{error.what}; preparing it again", file=sys.stderr)
        aside = fresh_path(folder)
        try:
            folder.rename(aside)  # at once: no other process sees a part of them
        except FileNotFoundError:
            return False  # another process was faster
        remove(aside)
        return False
    return True


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def trained_tokenizer(config: Config, corpus: Corpus, root: Path) -> Tokenizer:
    """The tokenizer trained on a corpus, from the cache if it is there. The file's name holds a digest of its content."""
    size, fraction, folder = config.tokenizer.vocab_size, config.data.validation_fraction, root / "tokenizers"
    key = digest(corpus.fingerprint, size, fraction)

    def file_of(model: bytes) -> Path:
        return folder / f"{key}-{hashlib.sha256(model).hexdigest()[:20]}.model"

    for path in sorted(folder.glob(f"{key}-*.model")):
        try:
            model = path.read_bytes()
        except FileNotFoundError:  # another process has found it damaged
            continue
        if path == file_of(model):
            return Tokenizer(model, str(path))
        print(f"{path}: damaged (its checksum differs); training it again", file=sys.stderr)
        path.unlink(missing_ok=True)
    print(f"Training a tokenizer of {size} pieces on {corpus.name}", file=sys.stderr)
    texts = (document.text for document, split in split_documents(corpus, fraction) if split == "train")
    model = train_tokenizer(texts, size)
    with replacing(file_of(model)) as fresh:
        fresh.write_bytes(model)
    remove_abandoned(folder)
    return Tokenizer(model, str(file_of(model)))


def split_documents(corpus: Corpus, validation_fraction: float) -> Documents:
    """All documents with their splits. The first is for validation, which thus has text under any token budget."""
    documents = corpus.documents()
    first = list(islice(documents, FEW_DOCUMENTS))
    everything: Iterator[Document] = chain(first, documents)
    if len(first) < FEW_DOCUMENTS:
        corpus.report.note(f"fewer than {FEW_DOCUMENTS} documents, so they were cut at line ends")
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
        print(
            "Note: this tokenizer can't restore every text; bits per byte count the bytes that its pieces stand for",
            file=sys.stderr,
        )
    with making_folder(folder) as fresh:
        write_manifest(fresh, write_splits(corpus, tokenizer, fresh, documents, splits, budget))


def write_splits(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, documents: Documents, names: tuple[str, ...], budget: int
) -> Manifest:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = {split: ShardWriter(folder, split, dtype) for split in names}
    counted_bytes = dict.fromkeys(names, 0)
    domains: list[str] = []
    bytes_read = 0
    with reading_bar(corpus) as show:
        for batch in batches(documents):
            ids = tokenizer.encode_batch([document.text for document, _ in batch], available_cpus())
            for (document, split), document_ids in zip(batch, ids, strict=True):
                if document.domain not in domains:
                    domains.append(document.domain)
                size = len(document.text.encode("utf-8"))
                bytes_read += size
                if writers[names[0]].tokens < budget:
                    with_ends = np.array([tokenizer.bos, *document_ids, tokenizer.eos], dtype=np.int64)
                    counted_bytes[split] += int(tokenizer.count_bytes(with_ends[:-1], with_ends[1:]).sum())
                    writers[split].add(with_ends, domains.index(document.domain), size)
            show(bytes_read)
            touch(folder)
            if writers[names[0]].tokens >= budget:
                corpus.report.note(f"reading stopped at data.tokens = {budget:,}")
                break
    splits = {name: writer.finish() for name, writer in writers.items()}
    check_size(corpus, splits)
    for name, size in counted_bytes.items():
        if not size:
            raise UserError(
                f"tokenizer.path: the tokenizer has no piece for any character of {corpus.name}, split {name}"
            )
    fingerprint = digest(*(shard.sha256 for split in splits.values() for shard in split.shards))
    report = corpus.report.lines()
    return Manifest(FORMAT_VERSION, corpus.name, tokenizer.fingerprint, dtype, domains, splits, fingerprint, report)


@contextlib.contextmanager
def reading_bar(corpus: Corpus) -> Iterator[Callable[[int], None]]:
    """A progress bar where one can be drawn. Yields the function that takes the bytes read so far."""
    if not shows_bars():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"Tokenising {corpus.name}", total=corpus.total_bytes)
        yield lambda done: bar.update(task, completed=done)


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
