"""The tokenizers of Transformers and llama.cpp give the ids of ours."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.random_runs import tokenizer
from tests.helpers.texts import texts
from tests.helpers.tokenizer_kinds import KINDS, trained
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError
from titan_moe.weights.tokenizer import Pieces, write_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", KINDS)
def test_a_thousand_texts_have_the_same_ids_and_come_back(name: str, tmp_path: Path) -> None:
    ours = KINDS[name]()
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
    ours = tokenizer()
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
