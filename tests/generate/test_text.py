"""From tokens to text: whole characters only, and stop strings cut exactly, however the tokens fall."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_moe.data.tokenizer import Tokenizer, train_tokenizer
from titan_moe.generate.text import StopStrings, TextStream

TEXT = "def f(x):\n\treturn  é中😀 end, déjà vu; the words of a text are its pieces. " * 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer([TEXT], 320), "test")


@pytest.mark.parametrize("before", ["", "x", "the words "])
@pytest.mark.parametrize("after", [" words", "中文 😀😀", "\u2581 literal", "é", "\ufffd!", "  spaces  \n"])
def test_streamed_text_is_the_text(tokenizer: Tokenizer, before: str, after: str) -> None:
    ids = tokenizer.encode(before)
    stream = TextStream(tokenizer, [tokenizer.bos, *ids])
    parts = [stream.push(token) for token in tokenizer.encode(after)]
    assert "".join(parts) + stream.finish() == after


def test_no_part_of_a_character_is_shown(tokenizer: Tokenizer) -> None:
    """U+1F680 is not in the training text, so it is four byte tokens."""
    ids = [tokenizer.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in "\U0001f680".encode()]
    stream = TextStream(tokenizer, [tokenizer.bos])
    assert [stream.push(token) for token in ids] == ["", "", "", "\U0001f680"]
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_cut_a_text_however_it_is_split(text: str, stops: list[str], cuts: list[int]) -> None:
    places = [text.find(stop) for stop in stops if stop in text]
    wanted = text[: min(places)] if places else text
    stream, shown = StopStrings(stops), ""
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(edges):
        shown += stream.push(text[start:end])
        assert wanted.startswith(shown)
    assert stream.found == bool(places)
    assert shown + stream.finish() == wanted


def test_a_stop_string_with_a_character_of_several_tokens(tokenizer: Tokenizer) -> None:
    stream, stops, shown = TextStream(tokenizer, [tokenizer.bos]), StopStrings(["b\U0001f680"]), ""
    for token in tokenizer.encode("ab\U0001f680c"):
        shown += stops.push(stream.push(token))
    assert stops.found
    assert shown == "a"
