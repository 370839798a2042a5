"""A run's sentencepiece tokenizer in the forms of Transformers and llama.cpp. Encoded texts begin with `bos`, as documents do.

Both take byte-pair models whose normalisation changes nothing but spaces; others are refused. Differences from ours that
remain: U+2581 in a text (our encoder spells it in bytes, theirs read a space), and the text of a control symbol such as
"</s>" (ours reads letters, theirs the symbol; Transformers reads letters with `split_special_tokens=True`).
"""

import importlib
import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from titan_moe.data.json_tokenizer import CONFIG_FILE, JsonTokenizer
from titan_moe.data.stored import JSON_FILE, TOKENIZER_FILE
from titan_moe.data.tokenizer import SPACE, Tokenizer
from titan_moe.errors import UserError
from titan_moe.runtime.optional import optional

BYTE_PAIRS = 2  # sentencepiece's TrainerSpec.BPE
SAMPLE = "def f(x):\n\treturn  x +  1\n\n  \u00e9\u4e2d\U0001f600 end \r\n" + " " * 9 + "a" * 9 + "0123"


class Kind(IntEnum):
    """Kinds of pieces, as numbered by sentencepiece, llama.cpp and the GGUF format."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Pieces:
    """The content of a sentencepiece model that can be said in another format."""

    def __init__(self, tokenizer: Tokenizer, origin: Path) -> None:
        """origin: names the model in messages. Raises UserError for a model that has no exact counterpart."""
        if isinstance(tokenizer, JsonTokenizer):
            raise UserError(
                f"{origin.parent}: its tokenizer is a tokenizer.json, which a GGUF file can't hold; use --format hf"
            )
        proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(
            tokenizer.model
        )
        spec = proto.normalizer_spec
        if proto.trainer_spec.model_type != BYTE_PAIRS:
            raise UserError(f"{origin}: not a byte-pair model; only those can be converted exactly")
        if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
            raise UserError(
                f"{origin}: its normalisation {spec.name!r} changes texts; only models without one can be converted exactly"
            )
        self.origin, self.tokenizer = origin, tokenizer
        self.texts = [piece.piece for piece in proto.pieces]
        self.scores = [float(piece.score) for piece in proto.pieces]
        self.kinds = [Kind(piece.type) for piece in proto.pieces]
        if Kind.UNUSED in self.kinds:
            raise UserError(f"{origin}: it has unused pieces, which can't be converted exactly")
        self.adds_space = bool(spec.add_dummy_prefix)
        self.has_space = SPACE in self.texts
        ids = tokenizer.pieces
        self.bos, self.eos, self.unknown, self.pad = tokenizer.bos, tokenizer.eos, ids.unk_id(), ids.pad_id()

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces whose concatenation is a piece, in the order in which sentencepiece merges them: by its score."""
        rank = {
            text: i for i, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True)) if kind == Kind.NORMAL
        }
        found = [
            (-self.scores[i], i, -cut, text[:cut], text[cut:])
            for text, i in rank.items()
            for cut in range(1, len(text))
            if text[:cut] in rank and text[cut:] in rank
        ]
        return [(left, right) for *_, left, right in sorted(found)]


def write_json(tokenizer: JsonTokenizer, folder: Path, length: int) -> None:
    """Writes a run's tokenizer.json as it is, and a tokenizer_config.json."""
    (folder / JSON_FILE).write_bytes(tokenizer.model)
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **{key: tokenizer.json.id_to_token(i) for key, i in names.items()},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(pieces: Pieces, folder: Path, length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and tokenizer.model. length: of the sequences in training.

    Raises UserError when the converted tokenizer gives other ids than ours."""
    converted = convert(pieces)
    if converted.encode(SAMPLE, add_special_tokens=False).ids != pieces.tokenizer.encode(SAMPLE):
        raise UserError(f"{pieces.origin}: this tokenizer can't be converted exactly; use --format gguf")
    converted.save(str(folder / "tokenizer.json"))
    names = {"bos_token": pieces.bos, "eos_token": pieces.eos, "unk_token": pieces.unknown, "pad_token": pieces.pad}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **{key: pieces.texts[i] for key, i in names.items() if i >= 0},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / TOKENIZER_FILE).write_bytes(pieces.tokenizer.model)


def convert(pieces: Pieces) -> Any:
    """A `tokenizers.Tokenizer` with the same ids."""
    tokenizers = optional("tokenizers", "hf")
    decoders, normalizers = tokenizers.decoders, tokenizers.normalizers
    model = tokenizers.models.BPE(
        vocab={text: i for i, text in enumerate(pieces.texts)},
        merges=pieces.merges(),
        unk_token=pieces.texts[pieces.unknown],
        fuse_unk=True,
        byte_fallback=Kind.BYTE in pieces.kinds,
    )
    converted = tokenizers.Tokenizer(model)
    # Without a piece for a space, a space stays one, and byte fallback gives its byte.
    spaces = [normalizers.Prepend(SPACE)] if pieces.adds_space else []
    spaces += [normalizers.Replace(" ", SPACE)]
    if pieces.has_space:
        converted.normalizer = normalizers.Sequence(spaces)
    strip = [decoders.Strip(" ", 1, 0)] if pieces.adds_space and pieces.has_space else []
    converted.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    added = tokenizers.AddedToken
    controls = [
        text for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind in (Kind.CONTROL, Kind.UNKNOWN)
    ]
    converted.add_special_tokens([added(text, special=True, normalized=False) for text in controls])
    own = [text for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind == Kind.USER_DEFINED]
    converted.add_tokens([added(text, special=False, normalized=True) for text in own])
    bos = pieces.texts[pieces.bos]
    converted.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, pieces.bos)]
    )
    return converted
