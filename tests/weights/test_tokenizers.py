"""The tokenizers of Transformers and llama.cpp give the ids of ours."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.helpers import random_runs
from tests.helpers.texts import texts
from titan_moe.data.tokenizer import Tokenizer, train_tokenizer
from titan_moe.errors import UserError
from titan_moe.weights.tokenizer import Pieces, write_tokenizer

transformers = pytest.importorskip("transformers")

PROSE = ["The quick brown fox, déjà vu — 42 times.\n" * 40, "def f(x):\n    return x + 1\n" * 40]


def trained(**options: Any) -> bytes:
    """A sentencepiece model of its usual kind, with these options changed."""
    model = io.BytesIO()
    lines = [line for text in PROSE for line in text.splitlines()]
    usual = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity"}
    usual |= {"remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **usual | options)
    return model.getvalue()


MODELS = {
    "ours": random_runs.tokenizer,
    "adds a space, as LLaMA-2's": lambda: Tokenizer(trained(add_dummy_prefix=True), "test"),
    "has user-defined pieces": lambda: Tokenizer(
        trained(user_defined_symbols=["return", "<0>"], add_dummy_prefix=False), "test"
    ),
    "without a piece for a space": lambda: Tokenizer(train_tokenizer(["中文字典" * 50, "字中" * 70], 270), "test"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_thousand_texts_have_the_same_ids_and_come_back(name: str, tmp_path: Path) -> None:
    ours = MODELS[name]()
    write_tokenizer(Pieces(ours, tmp_path), tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(theirs) == ours.vocab_size
    given = texts()
    assert len(given) >= 1000
    ids = theirs(given, add_special_tokens=False)["input_ids"]
    different = [text for text, found in zip(given, ids, strict=True) if found != ours.encode(text)]
    assert not different
    assert theirs.batch_decode(ids) == [ours.decode(found) for found in ids]
    assert theirs("x y")["input_ids"] == [ours.bos, *ours.encode("x y")]


def test_the_named_differences(tmp_path: Path) -> None:
    """Symbols written out are symbols unless one asks for their letters, and U+2581 is a space."""
    ours = random_runs.tokenizer()
    write_tokenizer(Pieces(ours, tmp_path), tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "a </s> b"
    assert ours.eos not in ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).count(ours.eos) == 1
    assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ours.encode(text)
    assert theirs.encode("a\u2581b", add_special_tokens=False) == ours.encode("a b") != ours.encode("a\u2581b")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 294}, "not a byte-pair model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "its normalisation 'nmt_nfkc' changes texts"),
        ({"remove_extra_whitespaces": True}, "changes texts"),
    ],
)
def test_a_model_without_an_exact_counterpart_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        Pieces(Tokenizer(trained(**options), "test"), tmp_path)
