"""The tokenizer is lossless and counts the bytes of source text of every token."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_moe.data.tokenizer import Tokenizer, read_tokenizer, train_tokenizer
from titan_moe.errors import UserError

TEXTS = [
    "def f(x):\n    return x + 1\n\n" * 40,
    "The quick brown fox, déjà vu — 42 times.\r\n" * 40,
    "中文 и українська\t\n" * 40,
]


def model_with_leading_space() -> bytes:
    """A model like LLaMA-2's: identity normalisation, byte fallback, a space added before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    return model.getvalue()


OURS = Tokenizer(train_tokenizer(TEXTS, 380), "test")
LLAMA_LIKE = Tokenizer(model_with_leading_space(), "test")

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("ab \n\t▁<s>0x41é", max_size=40)


@pytest.mark.parametrize("tokenizer", [OURS, LLAMA_LIKE], ids=["ours", "llama-like"])
@settings(max_examples=400, deadline=None)
@given(text=text)
def test_decoding_gives_any_text_back_and_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text], 2) == [ids]
    document = np.array([tokenizer.bos, *ids, tokenizer.eos])
    assert int(tokenizer.count_bytes(document[:-1], document[1:]).sum()) == len(text.encode("utf-8"))


def test_decoding_gives_control_characters_back() -> None:
    everything = "".join(map(chr, range(0x300))) + "\u2580\u2581\u2582\ufeff\U0010ffff" + TEXTS[0]
    assert OURS.lossless
    assert LLAMA_LIKE.lossless
    assert OURS.decode(OURS.encode(everything)) == everything


def test_training_is_deterministic_and_text_never_encodes_to_bos_or_eos() -> None:
    assert train_tokenizer(TEXTS, 380) == train_tokenizer(TEXTS, 380)
    assert OURS.vocab_size == 380
    assert OURS.bos != OURS.eos
    assert not {OURS.bos, OURS.eos} & set(OURS.encode("<s> </s> " + TEXTS[1]))


def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    junk = tmp_path / "junk.model"
    for content in (b"", b"not a model", bytes(range(256)) * 40):
        junk.write_bytes(content)
        with pytest.raises(UserError, match="not a sentencepiece model"):
            read_tokenizer(str(junk), "tokenizer.path")
    with pytest.raises(UserError, match=r"tokenizer\.path.*missing"):
        read_tokenizer(str(tmp_path / "missing.model"), "tokenizer.path")


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size = 4096"):
        train_tokenizer(["abc abc"], 4096)
