"""A tokenizer.json of Hugging Face's `tokenizers`, with the interface of our sentencepiece tokenizer.

Its template (`post_processor`) says which symbols begin and end a document, so that the file is complete by itself. Text is
encoded without the template, and the text of a special symbol such as "<|endoftext|>" is read as letters.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from titan_moe.data.tokenizer import SAMPLE, SPACE, Tokenizer
from titan_moe.errors import UserError
from titan_moe.runtime.json_file import read_json
from titan_moe.runtime.optional import optional

CONFIG_FILE = "tokenizer_config.json"


class JsonTokenizer(Tokenizer):
    """Text to token ids and back, from a tokenizer.json."""

    pad = -1
    """It has no symbol that fills a batch, or none that is known."""

    def __init__(self, model: bytes, origin: str) -> None:
        """model: the content of a tokenizer.json with `bos` and `eos` in its template. Raises UserError when it is not one."""
        stored, tokenizer = parsed(model, origin)
        self.json: Any = tokenizer
        self.json.encode_special_tokens = True
        self.json.no_truncation()
        self.json.no_padding()
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        before, after = template(stored)
        begin, end = (tokenizer.token_to_id(name) if name else None for name in (before or after, after))
        if begin is None or end is None:
            raise UserError(
                f"{origin}: nothing says which symbol ends a document; put its {CONFIG_FILE} with `eos_token` beside it"
            )
        self.bos, self.eos = begin, end
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        by_bytes = "ByteLevel" in kinds(stored.get("decoder"))
        if not by_bytes and not {"ByteFallback", "Metaspace", "Replace"} & kinds(stored.get("decoder")):
            raise UserError(f"{origin}: neither byte pairs nor pieces with byte fallback; only those can be used")
        symbols = tokenizer.get_added_tokens_decoder()
        lengths, starts = [], []
        for token in range(self.vocab_size):
            piece = tokenizer.id_to_token(token)
            added = symbols.get(token)
            lengths.append(
                0 if piece is None or (added and added.special) else piece_bytes(piece, by_bytes and not added)
            )
            starts.append(piece is not None and piece.startswith((SPACE, "\u0120", " ")))
        self.byte_lengths = np.array(lengths, dtype=np.int64)
        self.starts_with_space = np.array(starts) & (self.byte_lengths > 0)
        first = self.encode("x")
        # A space before the text, which must not count as a byte of the text.
        self.adds_space = bool(first) and bool(self.starts_with_space[first[0]])
        self.lossless = self.decode(self.encode(SAMPLE)) == SAMPLE

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without `bos` and `eos`. text: no lone surrogates."""
        ids: list[int] = self.json.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:  # noqa: ARG002 - it has threads of its own
        """`encode` of every text."""
        return [encoded.ids for encoded in self.json.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        text: str = self.json.decode([int(i) for i in ids], skip_special_tokens=False)
        return text


def parsed(model: bytes, origin: str) -> tuple[dict[str, Any], Any]:
    """The JSON of a tokenizer.json, and the tokenizer of package `tokenizers`. Raises UserError."""
    tokenizers = optional("tokenizers", "hf", origin)
    try:
        stored = json.loads(model)
        if not isinstance(stored, dict):
            raise ValueError("no table")
        return stored, tokenizers.Tokenizer.from_str(model.decode("utf-8"))
    except Exception as error:  # the package raises plain Exceptions
        raise UserError(f"{origin}: not a tokenizer.json: {(str(error).splitlines() or [''])[0][:200]}") from error


def piece_bytes(piece: str, by_bytes: bool) -> int:
    """Bytes of text that a piece stands for. by_bytes: every character of it stands for one byte."""
    if by_bytes:
        return len(piece)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace(SPACE, " ").encode("utf-8"))


def kinds(part: Any) -> set[str]:
    """The types of a decoder or post-processor and of those inside it."""
    if not isinstance(part, dict):
        return set()
    inner = part.get("decoders") or part.get("processors") or []
    return {str(part.get("type"))}.union(*(kinds(one) for one in inner))


def template(stored: dict[str, Any]) -> tuple[str, str]:
    """The symbols before and after a text by the template of a tokenizer.json; empty where there is none."""
    processor = stored.get("post_processor") or {}
    for one in [processor, *(processor.get("processors") or [])]:
        if isinstance(one, dict) and one.get("type") == "TemplateProcessing":
            names = [item["SpecialToken"]["id"] if "SpecialToken" in item else "" for item in one["single"]]
            place = names.index("")
            return (names[place - 1] if place else ""), (names[place + 1] if len(names) > place + 1 else "")
    return "", ""


def complete(model: bytes, folder: Path, origin: str) -> bytes:
    """A tokenizer.json whose template has `bos` and `eos`, as the tokenizer_config.json beside it names them.

    As it is where the template has an end already, or nothing names one. Raises UserError for a file that is not one."""
    stored, tokenizer = parsed(model, origin)
    before, after = template(stored)
    config: dict[str, Any] = {}
    path = folder / CONFIG_FILE
    if after or not path.is_file():
        return model
    try:
        loaded = read_json(path.resolve())  # in a download cache it is a link
        config = loaded if isinstance(loaded, dict) else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    begin, end = symbol(config, "bos_token") or before, symbol(config, "eos_token")
    if not end or tokenizer.token_to_id(end) is None:
        return model
    begin = begin if begin and tokenizer.token_to_id(begin) is not None else ""
    names = {name: tokenizer.token_to_id(name) for name in (begin, end) if name}
    around: list[dict[str, Any]] = [{"SpecialToken": {"id": begin, "type_id": 0}}] if begin else []
    around += [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}]
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": around,
        "pair": [*around, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in names.items()},
    }
    return json.dumps(stored, ensure_ascii=False).encode("utf-8")


def symbol(config: dict[str, Any], key: str) -> str:
    """A symbol of tokenizer_config.json: its text, or a table with it as `content`."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""
