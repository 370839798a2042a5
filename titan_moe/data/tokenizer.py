"""The tokenizer: sentencepiece, lossless: `decode(encode(x)) == x` for any UTF-8 text.

Default options of sentencepiece lose newlines, indentation and repeated blanks, and write U+2581 as a blank. The models
trained here keep all of it; `encode` spells U+2581 out in bytes.
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

BLANK = "\u2581"  # how sentencepiece writes a blank inside a piece
TRAINING_BYTES = 20 << 20  # of text that a tokenizer is trained on
PROBE = "def f(x):\n\treturn  x +  1\n\n  \u00e9\u4e2d\U0001f600 \u2581 end \r\n"


class Tokenizer:
    """Text to ids and back. `bos` opens every document, `eos` closes it."""

    def __init__(self, model: bytes, origin: str) -> None:
        """model: a serialised sentencepiece model. Raises UserError when it is none."""
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
        self.fingerprint = hashlib.sha256(model).hexdigest()
        spelled = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]
        self._blank_ids = spelled if all(self.pieces.is_byte(i) for i in spelled) else None
        # LLaMA-2's models put a blank before the text; its byte must not be counted as text.
        self.adds_blank = (
            bool(self.pieces.encode("x")) and self.pieces.id_to_piece(self.pieces.encode("x")[0])[0] == BLANK
        )
        self.byte_lengths = np.array([self._byte_length(i) for i in range(size)], dtype=np.int64)
        opening = [self.pieces.id_to_piece(i).startswith(BLANK) for i in range(size)]
        self.opens_with_blank = np.array(opening) & (self.byte_lengths > 0)
        self.lossless = self.decode(self.encode(PROBE)) == PROBE

    def _byte_length(self, token: int) -> int:
        if self.pieces.is_byte(token):
            return 1
        if self.pieces.is_control(token) or self.pieces.is_unknown(token):
            return 0
        return len(self.pieces.id_to_piece(token).replace(BLANK, " ").encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        if BLANK not in text or self._blank_ids is None:
            ids: list[int] = self.pieces.encode(text)
            return ids
        ids = []
        for index, part in enumerate(text.split(BLANK)):
            if index:
                ids += self._blank_ids
            encoded = self.pieces.encode(part)
            # Only the text's first part may get the blank that some models put in front.
            if index and self.adds_blank and encoded:
                encoded = self._encode_inside(part)
            ids += encoded
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """`encode` of every text, on several threads."""
        plain: list[list[int]] = self.pieces.encode(texts, num_threads=threads)
        return [self.encode(text) if BLANK in text else ids for text, ids in zip(texts, plain, strict=True)]

    def _encode_inside(self, part: str) -> list[int]:
        """Ids of a part that does not open the text, for models that put a blank before everything."""
        marker = self.pieces.encode("\n")
        ids: list[int] = self.pieces.encode("\n" + part)
        return ids[len(marker) :]

    def count_bytes(self, previous: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bytes of source text that each id stands for; `previous` is the id before it."""
        added = self.adds_blank & (previous == self.bos) & self.opens_with_blank[ids]
        return self.byte_lengths[ids] - added

    def decode(self, ids: list[int]) -> str:
        text: str = self.pieces.decode([int(i) for i in ids])
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A byte-pair model with byte fallback, the same for the same texts. Raises UserError when there is too little text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
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
        most = re.search(r"value <= (\d+)", str(error))
        reason = f"gives at most {most.group(1)} pieces" if most else "has no text to train a tokenizer on"
        raise UserError(
            f"tokenizer.vocab_size = {vocab_size}: this corpus {reason}; lower it, give more text, or set tokenizer.path"
        ) from error
    return model.getvalue()


def _sentences(texts: Iterable[str], length: int = 2000) -> Iterator[str]:
    """Pieces of text that sentencepiece takes as sentences, TRAINING_BYTES of them at most."""
    left = TRAINING_BYTES
    for text in texts:
        for start in range(0, len(text), length):
            part = text[start : start + length].replace("\0", "")
            left -= len(part.encode("utf-8"))
            if left < 0:
                return
            if part:
                yield part


def read_tokenizer(path: str, origin: str) -> Tokenizer:
    """A tokenizer from a .model file. Raises UserError."""
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{origin} = {path!r}: can't be read: {error.strerror}") from error
    return Tokenizer(model, f"{origin} = {path!r}")
