"""A corpus too large to tokenise before training: its tokens are written shard by shard, ahead of the run that reads them.

    tokens/<fingerprint>/
        manifest.json                   tokenizer, definition of the stream, and the validation split, as of any other corpus
        tokenizer                       its file, for the process that writes further shards
        validation-texts.npy            hashes of the validation texts, which are left out of training
        train-000000.bin                token ids of the shard's documents, `bos ids... eos` each
        train-000000-documents.npy      where each document begins in the shard
        train-000000.json               sizes and checksums, and where in the corpus the next shard begins; written last

The definition says everything that the tokens depend on: name and revision of the data set, the tokenizer, and the sizes of
shards. A shard ends with a whole document, and the next one can be written from the shard before it alone. So the shards are
the same whoever writes them, and however often the writer is stopped. The text itself is not hashed: it is not there yet.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titan_moe.config.extensions import Document
from titan_moe.data.digests import digest, read_checked, sha256, write_checked
from titan_moe.data.files import Corpus, reported
from titan_moe.data.report import Report
from titan_moe.data.shards import Split, check_file_size, read_manifest, verify, write_manifest
from titan_moe.data.tokenise import write_splits
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError
from titan_moe.runtime.optional import optional
from titan_moe.runtime.owner import making_folder, replacing

VERSION = 1
"""Of the definition: it changes when the same text gives other shards."""
VALIDATION_TOKENS = 1 << 22
TOKENIZER_FILE = "tokenizer"
TEXTS_FILE = "validation-texts.npy"


class Source(NamedTuple):
    """A data set of the Hugging Face hub whose rows are shuffled, with splits "train" and "validation"."""

    dataset: str
    config: str
    revision: str
    column: str


SOURCES = {"c4": Source("allenai/c4", "en", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "text")}


class Rows:
    """The documents of one split of a streamed corpus, in the data set's order, from any row on.

    After each document, `position()` is where the next one begins, as JSON keeps it: the state of the package `datasets`, and
    for its other versions the number of rows to skip, which takes as long as reading them."""

    def __init__(
        self, name: str, split: str, position: dict[str, Any] | None = None, without: frozenset[int] = frozenset()
    ):
        """position: None: from the first row on. without: hashes of texts that are left out."""
        self.name, self.without, self.report = name, without, Report()
        source = SOURCES[name]
        self.column = source.column
        self.datasets = optional("datasets", "hf", f"data.corpus = {name!r}")
        self.rows, self.version = 0, self.datasets.__version__
        with self.hub_errors():
            self.stream = self.datasets.load_dataset(
                source.dataset, source.config, split=split, streaming=True, revision=source.revision
            )
            if position is not None:
                self.rows = int(position["rows"])
                if position["datasets"] == self.version:
                    self.stream.load_state_dict(position["state"])
                else:  # another version of the package may number its blocks otherwise
                    self.stream, self.version = self.stream.skip(self.rows), ""  # whose state is of another form
        self.documents = self.kept()

    def __iter__(self) -> Iterator[Document]:
        """The one pass over the documents: a second `for` goes on where the first one was left."""
        return self.documents

    def kept(self) -> Iterator[Document]:
        for document in self.report.clean(self.raw()):
            if text_hash(document.text) not in self.without:
                yield document

    def raw(self) -> Iterator[Document]:
        with self.hub_errors():
            for row in self.stream:
                self.rows += 1
                yield Document(row[self.column], self.name)

    def position(self) -> dict[str, Any]:
        return {"rows": self.rows, "datasets": self.version, "state": self.stream.state_dict()}

    def hub_errors(self) -> "HubErrors":
        return HubErrors(self.name, self.datasets.exceptions.DatasetsError)


class HubErrors:
    """Turns errors of the hub inside a `with` block into a UserError of one line."""

    def __init__(self, name: str, kind: type[Exception]) -> None:
        self.name, self.kinds = name, (OSError, ConnectionError, kind)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self.kinds):
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"data.corpus = {self.name!r}: the hub can't be reached ({first}); give the path of local files instead"
            ) from error


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def streamed_corpus(name: str) -> Corpus:
    """The training documents of a streamed corpus from the first row on: for a tokenizer, and to tokenise all of them."""
    return reported(name, lambda _: iter(Rows(name, "train")), f"{name}:{':'.join(SOURCES[name][1:3])}")


@dataclass(frozen=True)
class StreamedShard:
    """One shard of the training split: the content of its JSON file."""

    tokens: int
    documents: int
    source_bytes: int
    sha256: str
    documents_sha256: str
    ended: bool
    """Whether no further shard follows: the text has ended, or `data.tokens` is reached."""
    position: dict[str, Any]
    """Where the next shard begins (`Rows.position`)."""


class StreamFolder:
    """The folder of a stream, and the shards of its training split that are there."""

    def __init__(self, folder: Path) -> None:
        """Raises DamagedShards for a damaged manifest or validation split."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.definition = self.manifest.stream or {}
        self.shards: list[StreamedShard] = []
        """The first shards, up to the first that is missing."""
        self.tokens = 0
        self.update()

    @property
    def ended(self) -> bool:
        """Whether all tokens of the stream are there."""
        return bool(self.shards) and self.shards[-1].ended

    def update(self) -> None:
        """Adds shards that were written meanwhile."""
        while not self.ended:
            shard = self.read(len(self.shards))
            if shard is None:
                return
            self.shards.append(shard)
            self.tokens += shard.tokens

    def has(self, tokens: int) -> bool:
        """Whether so many tokens are there, or all that there will ever be."""
        return self.ended or self.tokens >= tokens

    def counts(self) -> Split:
        """Tokens, documents and bytes of text of the training split so far."""
        tokens, documents, source_bytes = (
            sum(getattr(shard, name) for shard in self.shards) for name in ("tokens", "documents", "source_bytes")
        )
        return Split([], tokens, documents, source_bytes, "")

    def path(self, index: int, kind: str) -> Path:
        """A file of shard `index`. kind: ".bin", "-documents.npy" or ".json"."""
        return self.folder / f"train-{index:06d}{kind}"

    def read(self, index: int) -> StreamedShard | None:
        """A shard; None when it is not there, or damaged, so that it has to be written (again)."""
        try:
            shard = StreamedShard(**read_checked(self.path(index, ".json")))
            size = np.dtype(self.manifest.dtype).itemsize
            check_file_size(self.folder, self.path(index, ".bin").name, shard.tokens * size)
            check_file_size(self.folder, self.path(index, "-documents.npy").name, 128 + 8 * shard.documents)
        except (FileNotFoundError, ValueError, TypeError, UserError):
            return None
        return shard

    def write(self, index: int, shard: "ShardContent", ended: bool, position: dict[str, Any]) -> StreamedShard:
        """Writes a shard's files, its JSON file last. Raises OSError."""
        content, documents = self.path(index, ".bin"), self.path(index, "-documents.npy")
        with replacing(content) as fresh:
            fresh.write_bytes(b"".join(ids.astype(self.manifest.dtype).tobytes() for ids in shard.ids))
        with replacing(documents) as fresh, fresh.open("wb") as file:
            np.save(file, np.array(shard.starts, dtype=np.int64))
        sums = sha256(content), sha256(documents)
        facts = StreamedShard(shard.tokens, len(shard.starts), shard.source_bytes, *sums, ended, position)
        with replacing(self.path(index, ".json")) as fresh:
            write_checked(fresh, asdict(facts))
        return facts

    def validation_texts(self) -> frozenset[int]:
        """Hashes of the validation texts. Raises DamagedShards."""
        path = self.folder / TEXTS_FILE
        verify(path, self.definition["texts_sha256"], self.folder)
        return frozenset(np.load(path, allow_pickle=False).tolist())


class ShardContent:
    """What goes into one shard."""

    def __init__(self) -> None:
        self.ids: list[Any] = []
        self.starts: list[int] = []
        self.tokens = self.source_bytes = 0

    def add(self, ids: Any, source_bytes: int) -> None:
        self.starts.append(self.tokens)
        self.ids.append(ids)
        self.tokens += len(ids)
        self.source_bytes += source_bytes


def stream_fingerprint(name: str, tokenizer: Tokenizer, tokens: int, shuffle_tokens: int) -> str:
    """Identifies the tokens of a stream by all that they depend on. tokens: where it ends (`data.tokens`); 0: nowhere."""
    sizes = (tokens, shuffle_tokens, VALIDATION_TOKENS)
    return digest("stream", VERSION, *SOURCES[name], tokenizer.fingerprint, *sizes)


def make_stream(folder: Path, name: str, tokenizer: Tokenizer, tokens: int, shuffle_tokens: int) -> None:
    """Makes the folder of a stream, with its validation split: the first VALIDATION_TOKENS of the data set's own. Raises
    UserError."""
    hashes: list[int] = []

    def documents(_: Report) -> Iterator[Document]:
        for document in Rows(name, "validation"):
            hashes.append(text_hash(document.text))
            yield document

    corpus = reported(name, documents, "")
    with making_folder(folder) as fresh:
        split = ((document, "validation") for document in corpus.documents())
        manifest = write_splits(corpus, tokenizer, fresh, split, ("validation",), VALIDATION_TOKENS)
        (fresh / TOKENIZER_FILE).write_bytes(tokenizer.model)
        np.save(fresh / TEXTS_FILE, np.array(sorted(set(hashes)), dtype=np.uint64))
        definition = {
            "corpus": name,
            "tokens": tokens,
            "shuffle_tokens": shuffle_tokens,
            "texts_sha256": sha256(fresh / TEXTS_FILE),
        }
        write_manifest(fresh, replace(manifest, fingerprint=folder.name, stream=definition))


def tokens_needed(step: int, batch_size: int, seq_len: int, shuffle_tokens: int) -> int:
    """Tokens of a stream that must be there for a step (counted from 0): those of all windows that its own are shuffled with.

    The last window's last label is the token after it."""
    group = group_windows(seq_len, shuffle_tokens)
    last = (step + 1) * batch_size - 1
    return (last // group + 1) * group * seq_len + 1


def group_windows(seq_len: int, shuffle_tokens: int) -> int:
    """How many consecutive windows are shuffled among each other."""
    return max(1, shuffle_tokens // seq_len)
