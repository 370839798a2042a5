"""Tokenises a corpus into shards, once: a cache keeps them under a key of corpus and tokenizer.

A streamed corpus is tokenised only as far as the first step needs; `titan_moe/data/streams.py` has the rest.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

from titan_moe.config.checks import check_vocabulary
from titan_moe.config.extensions import is_streamed
from titan_moe.config.tables import Config
from titan_moe.data.corpora import open_corpus
from titan_moe.data.digests import digest
from titan_moe.data.files import Corpus
from titan_moe.data.shards import FORMAT_VERSION, SPLITS, DamagedShards, Manifest, read_manifest
from titan_moe.data.stream_writer import write_stream
from titan_moe.data.streams import StreamFolder, make_stream, stream_fingerprint, tokens_needed
from titan_moe.data.tokenise import make_shards, split_documents, tokenising_bar
from titan_moe.data.tokenizer import Tokenizer, read_tokenizer, train_tokenizer
from titan_moe.errors import UserError
from titan_moe.runtime.home import cache_folder
from titan_moe.runtime.owner import fresh_path, remove, remove_abandoned, replacing


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


def prepare(
    config: Config, text: str = "", tokenizer: Tokenizer | None = None, quiet: bool = False, whole: bool = False
) -> Prepared:
    """The tokenizer and shards of a configuration, made unless the cache has them. Raises UserError.

    text: a corpus to tokenise in place of `data.corpus`, all of it as one split "text", with the same tokenizer.
    tokenizer: used in place of the configuration's. quiet: when shards are made, do not print what was left out of them.
    whole: make all shards of a streamed corpus that the run reads, not only those of its first step.
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
        if not text and is_streamed(data.corpus):
            return prepare_stream(config, tokenizer, root, quiet, whole)
        check_vocabulary(config, tokenizer.vocab_size)
        key: list[object] = [source.fingerprint, tokenizer.fingerprint]
        key = ["text", *key] if text else [*key, data.tokens, data.validation_fraction]
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
        make_shards(source, tokenizer, folder, documents, splits, (0 if text else data.tokens) or sys.maxsize)
        manifest = read_manifest(folder)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {error.filename or root}: {error.strerror}; make room, or choose another with data.cache_dir"
        ) from error
    if not quiet:
        say_what_was_read(manifest)
    return Prepared(tokenizer, folder, manifest)


def prepare_stream(config: Config, tokenizer: Tokenizer, root: Path, quiet: bool, whole: bool) -> Prepared:
    """A streamed corpus: its validation split, and as many training tokens as the first step needs (whole: the run).

    Raises UserError, OSError."""
    data, training = config.data, config.training
    assert isinstance(data.corpus, str)
    check_vocabulary(config, tokenizer.vocab_size)
    fingerprint = stream_fingerprint(data.corpus, tokenizer, data.tokens, data.shuffle_tokens)
    folder = root / "tokens" / fingerprint
    if not usable(folder):
        make_stream(folder, data.corpus, tokenizer, data.tokens, data.shuffle_tokens)
        if not quiet:
            say_what_was_read(read_manifest(folder))
    stream = StreamFolder(folder)
    last = training.steps - 1 if whole else 0
    tokens = tokens_needed(last, training.batch_size, training.seq_len, data.shuffle_tokens)
    if not stream.has(tokens):
        with tokenising_bar(data.corpus, tokens) as show:
            write_stream(stream, tokens, show)
    if stream.tokens < 3:
        raise UserError(f"data.corpus: {data.corpus} has too little text")
    return Prepared(tokenizer, folder, stream.manifest)


def say_what_was_read(manifest: Manifest) -> None:
    print("\n  ".join([f"Read {manifest.report[0]}", *manifest.report[1:]]), file=sys.stderr)


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
