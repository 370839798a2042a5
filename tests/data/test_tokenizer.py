"""The tokenizer is lossless and counts the bytes of source text of every token."""

import io
from collections.abc import Iterator
from pathlib import Path

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
WITHOUT_SPACES = Tokenizer(train_tokenizer(["中文字典" * 50, "字中" * 70], 270), "test")  # no piece for a space

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("ab \n\t▁<s>0x41é", max_size=40)


@pytest.mark.parametrize("tokenizer", [OURS, LLAMA_LIKE, WITHOUT_SPACES], ids=["ours", "llama-like", "without spaces"])
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


def test_a_vocabulary_of_the_wrong_size_is_refused_with_the_nearest_possible_one() -> None:
    for size in (4096, 2**24 - 1):
        with pytest.raises(UserError, match=rf"tokenizer\.vocab_size = {size}: .*at most 270 pieces; lower it"):
            train_tokenizer(["abc abc"], size)
    assert Tokenizer(train_tokenizer(["abc abc"], 270), "test").vocab_size == 270
    many = ["".join(map(chr, range(0x4E00, 0x4E00 + 200))) * 5]
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size = 320: .*at least 460 pieces.*raise it"):
        train_tokenizer(many, 320)
    assert Tokenizer(train_tokenizer(many, 460), "test").vocab_size == 460


def test_text_with_any_character_trains() -> None:
    """sentencepiece skips sentences with U+2585; a text that has it everywhere must train as one with another sign does."""
    sign, other = ([f"one {c} two {c} three"] * 50 for c in "\u2585\u2586")
    tokenizer = Tokenizer(train_tokenizer(sign, 280), "test")
    assert tokenizer.decode(tokenizer.encode(sign[0])) == sign[0]
    assert len(tokenizer.encode("three")) == len(Tokenizer(train_tokenizer(other, 280), "test").encode("three"))
    everything = ["".join(map(chr, range(start, start + 256))) for start in range(0, 0x3000, 256)]
    assert Tokenizer(train_tokenizer(everything, 14_000), "test").lossless


def test_an_error_of_the_text_is_raised_as_it_is() -> None:
    def texts() -> Iterator[str]:
        yield "some text"
        raise UserError("the reason")

    with pytest.raises(UserError, match=r"^the reason$"):
        train_tokenizer(texts(), 300)
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer(["", "\0"], 300)


def test_a_tilde_in_the_path_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.model").write_bytes(OURS.model)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_tokenizer("~/t.model", "tokenizer.path").fingerprint == OURS.fingerprint
    for path in ("a\0b", "~nobody-of-this-name/t.model"):
        with pytest.raises(UserError, match=r"tokenizer\.path"):
            read_tokenizer(path, "tokenizer.path")
