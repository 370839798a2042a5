"""Tokenises documents into shards of a folder.

    token ids of a document = bos, its pieces, eos

A hash of a document's text decides whether it is for training or validation, so the same text is never in both splits.
A corpus of fewer than 20 documents (one long file, for example) is first cut into pieces at line ends.
"""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

import numpy as np

from titan_moe.config.extensions import Document
from titan_moe.data.digests import digest
from titan_moe.data.files import Corpus
from titan_moe.data.shards import FORMAT_VERSION, Manifest, ShardWriter, Split, write_manifest
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError
from titan_moe.runtime.cpus import available_cpus
from titan_moe.runtime.owner import making_folder, touch
from titan_moe.runtime.terminal import shows_bars

FEW_DOCUMENTS = 20
CUT_CHARACTERS = 4096
BATCH_CHARACTERS = 1 << 21

Documents: TypeAlias = Iterator[tuple[Document, str]]
"""Documents with the split that each belongs to."""


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
    with tokenising_bar(corpus.name, corpus.total_bytes, in_bytes=True) as show:
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
                corpus.report.note(f"reading stopped at {budget:,} tokens")
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
def tokenising_bar(name: str, total: int | None, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar where one can be drawn. Yields the function that takes the tokens (in_bytes: bytes) read so far."""
    if not shows_bars():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"Tokenising {name}", total=total)
        yield lambda done: bar.update(task, completed=done)


def check_size(corpus: Corpus, splits: dict[str, Split]) -> None:
    """Raises UserError where a split has no text."""
    if sum(split.tokens for split in splits.values()) == 0:
        raise UserError(f"data.corpus: the corpus {corpus.name} is empty")
    for name, split in splits.items():
        if split.tokens < 3:
            raise UserError(f"data.corpus: {corpus.name} has too little text, nothing is left for {name}; give more")


def batches(documents: Documents, characters: int = BATCH_CHARACTERS) -> Iterator[list[tuple[Document, str]]]:
    """Groups documents into lists of at least so many characters. Takes no document before the list that it belongs to."""
    batch: list[tuple[Document, str]] = []
    size = 0
    for document, split in documents:
        batch.append((document, split))
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
