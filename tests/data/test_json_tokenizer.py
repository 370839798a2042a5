"""A tokenizer.json in place of a sentencepiece model: the same interface, ids and bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.byte_level import END, byte_level
from tests.helpers.random_runs import tokenizer as sentencepiece_tokenizer
from titan_moe.data.tokenizer import SAMPLE, Tokenizer, read_tokenizer, tokenizer_of
from titan_moe.errors import UserError

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [SAMPLE, "", " a", "The quick brown fox\n", "déjà vu — 中文 😀\t\r\n", f"before {END} after"]


def write(folder: Path, made: Any, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def read(path: Path) -> Tokenizer:
    return read_tokenizer(str(path), "tokenizer.path")


def test_bytes_ids_and_texts(tmp_path: Path) -> None:
    """Every text comes back, its tokens' bytes add up, and the text of a special symbol is letters, not the symbol."""
    found = read(write(tmp_path, byte_level(), eos_token=END))
    assert (found.vocab_size, found.bos, found.eos) == (300, 0, 0)
    assert found.lossless
    assert not found.adds_space
    batch = found.encode_batch(TEXTS, 1)
    for text, ids in zip(TEXTS, batch, strict=True):
        assert ids == found.encode(text)
        assert found.decode(ids) == text
        assert found.eos not in ids
        previous = np.array([found.bos, *ids][:-1], dtype=np.int64)
        assert found.count_bytes(previous, np.array(ids, dtype=np.int64)).sum() == len(text.encode())
    assert found.byte_lengths[found.eos] == 0


def test_the_file_of_a_run_is_complete_by_itself(tmp_path: Path) -> None:
    path = write(tmp_path, byte_level(), eos_token={"content": END, "lstrip": False}, bos_token=None)
    found = read(path)
    again = tokenizer_of(found.model, "the run's file")
    assert (again.fingerprint, again.bos, again.eos) == (found.fingerprint, found.bos, found.eos)
    assert again.encode(SAMPLE) == found.encode(SAMPLE)
    there = tokenizers.Tokenizer.from_str(found.model.decode())
    assert there.encode("fox").ids == [
        *found.encode("fox"),
        found.eos,
    ]  # as a document is stored, without a bos of its own
    with pytest.raises(UserError, match=r"nothing says which symbol ends a document; put its tokenizer_config\.json"):
        tokenizer_of(path.read_bytes(), "the run's file")


def test_settings_for_batches_do_not_cut_texts(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(4)
    made.enable_padding(length=8)
    found = read(write(tmp_path, made, eos_token=END))
    assert found.decode(found.encode(SAMPLE)) == SAMPLE


def test_a_converted_sentencepiece_model_gives_its_ids_and_bytes(tmp_path: Path) -> None:
    from titan_moe.weights.tokenizer import Pieces, convert

    wanted = sentencepiece_tokenizer()
    made = convert(Pieces(wanted, tmp_path))
    found = read(write(tmp_path, made, bos_token="<s>", eos_token="</s>"))
    assert (found.vocab_size, found.bos, found.eos) == (wanted.vocab_size, wanted.bos, wanted.eos)
    for text in TEXTS[1:]:
        assert found.encode(text) == wanted.encode(text)
        assert found.decode(found.encode(text)) == text
    assert found.byte_lengths.tolist() == wanted.byte_lengths.tolist()
    assert found.starts_with_space.tolist() == wanted.starts_with_space.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", r"not a tokenizer\.json"),
        (b"{", r"not a tokenizer\.json"),
        (b'{"model": {"type": "BPE", "vocab": 3, "merges": []}}', r"not a tokenizer\.json"),
    ],
)
def test_damaged_files_are_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_kinds_whose_bytes_are_unknown_are_refused(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, END: 1}, unk_token="a"))
    with pytest.raises(UserError, match="neither byte pairs nor pieces with byte fallback"):
        read(write(tmp_path, made, eos_token=END))


def test_a_gguf_file_does_not_take_it(tmp_path: Path) -> None:
    from titan_moe.weights.tokenizer import Pieces

    found = read(write(tmp_path, byte_level(), eos_token=END))
    with pytest.raises(UserError, match="which a GGUF file can't hold; use --format hf"):
        Pieces(found, tmp_path / "run" / "tokenizer.model")
