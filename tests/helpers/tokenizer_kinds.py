"""Sentencepiece models of several kinds."""

import io
from typing import Any

import sentencepiece

from tests.helpers.random_runs import tokenizer
from titan_moe.data.tokenizer import Tokenizer, train_tokenizer

PROSE = ["The quick brown fox, déjà vu — 42 times.\n" * 40, "def f(x):\n    return x + 1\n" * 40]


def trained(**options: Any) -> bytes:
    """A sentencepiece model of its usual kind, with these options changed."""
    model = io.BytesIO()
    lines = [line for text in PROSE for line in text.splitlines()]
    usual = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity"}
    usual |= {"remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **usual | options)
    return model.getvalue()


KINDS = {
    "ours": tokenizer,
    "adds a space, as LLaMA-2's": lambda: Tokenizer(trained(add_dummy_prefix=True), "test"),
    "has user-defined pieces": lambda: Tokenizer(
        trained(user_defined_symbols=["return", "<0>"], add_dummy_prefix=False), "test"
    ),
    "without a piece for a space": lambda: Tokenizer(train_tokenizer(["中文字典" * 50, "字中" * 70], 270), "test"),
}
