"""A lossless sentencepiece tokenizer: `decode(encode(x)) == x` for any UTF-8 text.

With its default options sentencepiece loses newlines, indentation and repeated spaces, and decodes U+2581 as a space.
The models trained here keep all of them; `encode` encodes U+2581 as its three bytes, and a space as a space where the model
has no piece for it and would write U+2581 in its place.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from titan_moe.errors import UserError
from titan_moe.runtime.files import read_file

SKIPPED = "\u2585"  # sentencepiece does not train on a sentence with this character
SPACE = "\u2581"  # sentencepiece's character for a space inside a piece
TRAINING_BYTES = 20 << 20  # of text, at most, that a tokenizer is trained on
TOKENIZER_BYTES = 64 << 20
"""The largest file of a tokenizer that is read."""
SAMPLE = "def f(x):\n\treturn  x +  1\n\n  \u00e9\u4e2d\U0001f600 \u2581 end \r\n"


class Tokenizer:
    """Text to token ids and back. Every document is stored as `bos`, its ids, `eos`."""

    def __init__(self, model: bytes, origin: str) -> None:
        """model: the content of a sentencepiece .model file. Raises UserError when it is not one."""
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
            size = self.pieces.vocab_size()
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{origin}: not a sentencepiece model: {str(error).splitlines()[0]}") from error
        if size == 0:
            raise UserError(f"{origin}: not a sentencepiece model")
        self.vocab_size: int = size
        self.bos = self.pieces.bos_id() if self.pieces.bos_id() >= 0 else self.pieces.eos_id()
        self.eos = self.pieces.eos_id() if self.pieces.eos_id() >= 0 else self.bos
        if self.bos < 0:
            raise UserError(
                f"{origin}: the model has neither a begin nor an end symbol, so documents can't be separated"
            )
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        byte_ids = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in (*SPACE.encode(), *b" ")]
        has_bytes = all(self.pieces.is_byte(i) for i in byte_ids)
        self._space_ids = byte_ids[:-1] if has_bytes else None
        # A model trained on text without spaces has no piece for U+2581, its sign for a space, and spells that in bytes.
        no_piece = self.pieces.piece_to_id(SPACE) == self.pieces.unk_id()
        self._blank = byte_ids[-1] if has_bytes and no_piece else None
        self._spells_prefix = self._blank is not None and self.pieces.encode("x")[:3] == self._space_ids
        # Models like LLaMA-2's put a space before the text, which must not count as a byte of the text.
        self.adds_space = (
            bool(self.pieces.encode("x")) and self.pieces.id_to_piece(self.pieces.encode("x")[0])[0] == SPACE
        )
        self.byte_lengths = np.array([self._byte_length(i) for i in range(size)], dtype=np.int64)
        starts = [self.pieces.id_to_piece(i).startswith(SPACE) for i in range(size)]
        self.starts_with_space = np.array(starts) & (self.byte_lengths > 0)
        self.lossless = self.decode(self.encode(SAMPLE)) == SAMPLE

    def _byte_length(self, token: int) -> int:
        if self.pieces.is_byte(token):
            return 1
        if self.pieces.is_control(token) or self.pieces.is_unknown(token):
            return 0
        return len(self.pieces.id_to_piece(token).replace(SPACE, " ").encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without `bos` and `eos`. text: no lone surrogates."""
        if SPACE not in text or self._space_ids is None:
            return self._blanks_restored(self.pieces.encode(text))
        ids: list[int] = []
        for index, part in enumerate(text.split(SPACE)):
            if index:
                ids += self._space_ids
            encoded = self._blanks_restored(self.pieces.encode(part))
            # Such models add a space to the start of the text only, not to the parts that it is split into here.
            if index and self.adds_space and encoded:
                encoded = self._encode_inside(part)
            ids += encoded
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """`encode` of every text, on several threads."""
        plain: list[list[int]] = self.pieces.encode(texts, num_threads=threads)
        pairs = zip(texts, plain, strict=True)
        return [self.encode(text) if SPACE in text else self._blanks_restored(ids) for text, ids in pairs]

    def _blanks_restored(self, ids: list[int]) -> list[int]:
        """The ids of a text without U+2581, with a space in place of each U+2581 that the model has spelt in bytes."""
        if self._blank is None or self._space_ids is None:
            return ids
        restored: list[int] = []
        for token in ids:
            restored.append(token)
            if restored[-3:] == self._space_ids:
                restored[-3:] = [self._blank]
        return restored[1:] if self._spells_prefix else restored

    def _encode_inside(self, part: str) -> list[int]:
        """Ids of a part that is not at the start of the text, for models that add a space to what they encode."""
        newline_ids = self.pieces.encode("\n")
        ids: list[int] = self.pieces.encode("\n" + part)
        return ids[len(newline_ids) :]

    def count_bytes(self, previous: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bytes of source text per id. previous: the id before each, to recognise the start of a document."""
        added = self.adds_space & (previous == self.bos) & self.starts_with_space[ids]
        return self.byte_lengths[ids] - added

    def decode(self, ids: list[int]) -> str:
        text: str = self.pieces.decode([int(i) for i in ids])
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A .model file of byte pairs with byte fallback, deterministic. Raises UserError for too little text.

    Errors of `texts` are raised as they are.
    """
    model = io.BytesIO()
    # A list, since sentencepiece would report any error of an iterator as one of its own.
    sentences = list(_sentences(texts))
    if not sentences:
        raise UserError("data.corpus: no text to train a tokenizer on; give more, or set tokenizer.path")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 16,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"tokenizer.vocab_size = {vocab_size}: {training_problem(str(error))}") from error
    return model.getvalue()


def training_problem(message: str) -> str:
    """What sentencepiece says, and what to do about it."""
    if maximum := re.search(r"value <= (\d+)", message):
        return f"this corpus gives at most {maximum.group(1)} pieces; lower it, give more text, or set tokenizer.path"
    if minimum := re.search(r"\d+ vs (\d+)", message):
        return f"this corpus needs at least {minimum.group(1)} pieces, for its characters; raise it"
    return f"no tokenizer can be trained on this corpus ({message.splitlines()[0]}); set tokenizer.path"


def _sentences(texts: Iterable[str], length: int = 2000) -> Iterator[str]:
    """Pieces of `length` characters for sentencepiece, at most TRAINING_BYTES in all."""
    remaining = TRAINING_BYTES
    for text in texts:
        for start in range(0, len(text), length):
            part = text[start : start + length].replace("\0", "")
            remaining -= len(part.encode("utf-8"))
            if remaining < 0:
                return
            yield from filter(None, part.split(SKIPPED))


def read_tokenizer(path: str, origin: str) -> Tokenizer:
    """A tokenizer from a .model file or a tokenizer.json; `~` is the home directory. Raises UserError."""
    try:
        model = read_file(Path(path).expanduser().resolve(), TOKENIZER_BYTES)  # in a download cache it is a link
    except OSError as error:
        raise UserError(f"{origin} = {path!r}: can't be read: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # a NUL character; no home directory
        raise UserError(f"{origin} = {path!r}: {error}") from error
    return tokenizer_of(model, f"{origin} = {path!r}", Path(path).expanduser().parent)


def is_json(model: bytes) -> bool:
    """Whether the content of a tokenizer's file is a tokenizer.json; else it is a sentencepiece model."""
    return model[:1] == b"{"


def tokenizer_of(model: bytes, origin: str, folder: Path | None = None) -> Tokenizer:
    """A tokenizer from the content of a sentencepiece model or a tokenizer.json. Raises UserError.

    folder: where a tokenizer_config.json names the symbols that begin and end a document; None: the content is complete."""
    if not is_json(model):
        return Tokenizer(model, origin)
    from titan_moe.data.json_tokenizer import JsonTokenizer, complete  # imports an optional package

    return JsonTokenizer(model if folder is None else complete(model, folder, origin), origin)
