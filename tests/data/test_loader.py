"""Batches: every token predicted once, documents kept apart, and the order a pure function of (seed, step, sequence)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from titan_moe.data import shards
from titan_moe.data.loader import TrainingSteps, Windows, permuted, training_loader, validation_batches
from titan_moe.data.shards import Manifest, ShardWriter, TokenStream
from titan_moe.train.inputs import to_inputs

SEQ, PAD = 8, 0


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStream:
    """Nine documents of different lengths over several shards; every token is a number of its own."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 20)
    writer = ShardWriter(tmp_path, "train", "uint16")
    start = 100
    for length in (5, 1, 12, 30, 2, 7, 3, 16, 9):
        writer.add(np.arange(start, start + length), domain=0, source_bytes=length)
        start += length
    split = writer.finish()
    assert len(split.shards) == 5
    manifest = Manifest(1, "test", "", "uint16", [""], {"train": split}, "")
    return TokenStream(tmp_path, manifest, "train")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 1025])
def test_permutation(size: int) -> None:
    order = permuted(np.arange(size), size, key=5)
    assert sorted(order) == list(range(size))
    if size > 3:
        assert list(order) != list(permuted(np.arange(size), size, key=6))
        assert list(order) != list(range(size))
    one_by_one = [int(permuted(np.array([i]), size, key=5)[0]) for i in range(size)]
    assert one_by_one == list(order)


def test_permutation_has_no_drift() -> None:
    """Mean displacement of a uniform permutation is n/3; its deviation over n = 10,000 draws is about n / sqrt(18 n)."""
    n = 10_000
    shift = np.abs(permuted(np.arange(n), n, key=1) - np.arange(n)).mean()
    assert shift == pytest.approx(n / 3, abs=4 * n / (18 * n) ** 0.5)


def test_an_epoch_predicts_every_token_of_a_document_once(stream: TokenStream) -> None:
    windows = Windows(stream, SEQ, PAD)
    batch = windows.batch(np.arange(len(windows)))
    predicted = sorted(batch.labels[batch.loss_mask].tolist())
    firsts = set((100 + stream.starts).tolist())  # nothing comes before a document's first token
    assert predicted == [t for t in range(100, 100 + len(stream)) if t not in firsts]
    assert batch.label_count == len(predicted)
    same = batch.labels[batch.loss_mask] == batch.tokens[batch.loss_mask] + 1
    assert bool(same.all())


def test_documents_and_positions(stream: TokenStream) -> None:
    windows = Windows(stream, SEQ, PAD, document_positions=True)
    batch = windows.batch(np.arange(len(windows)))
    for row in range(len(windows)):
        for column in range(SEQ):
            token = int(batch.tokens[row, column])
            if token == PAD:
                assert not batch.loss_mask[row, column]
                continue
            document = int(np.searchsorted(stream.starts, token - 100, side="right") - 1)
            assert int(batch.document_ids[row, column]) == document
            assert int(batch.positions[row, column]) == min(token - 100 - int(stream.starts[document]), column)
    plain = Windows(stream, SEQ, PAD).batch(np.arange(2))
    assert plain.positions.tolist() == [list(range(SEQ))] * 2


def test_sequence_of_a_step_is_a_pure_function(stream: TokenStream) -> None:
    windows = Windows(stream, SEQ, PAD)
    steps = TrainingSteps(windows, batch_size=4, seed=3)
    walked = [batch for _, batch in zip(range(9), steps, strict=False)]
    for n in (7, 0, 4):
        assert torch.equal(walked[n].tokens, windows.batch(steps.indices(n)).tokens)
    # Another batch size cuts the same stream elsewhere.
    flat = np.concatenate([steps.indices(n) for n in range(9)])
    other = TrainingSteps(windows, batch_size=6, seed=3)
    assert np.array_equal(flat, np.concatenate([other.indices(n) for n in range(6)]))
    # Every epoch is a permutation of its own.
    count = len(windows)
    first, second = flat[:count], flat[count : 2 * count]
    assert sorted(first) == sorted(second) == list(range(count))
    assert list(first) != list(second)


def test_loader_resumes_from_its_state(stream: TokenStream) -> None:
    windows = Windows(stream, SEQ, PAD)
    loader = training_loader(windows, 4, seed=0)
    walker = iter(loader)
    for _ in range(5):
        next(walker)
    state = loader.state_dict()
    wanted = [next(walker).tokens for _ in range(3)]
    resumed = training_loader(windows, 4, seed=0)
    resumed.load_state_dict(state)
    again = iter(resumed)
    assert all(torch.equal(next(again).tokens, w) for w in wanted)


def test_micro_batches_keep_the_global_label_count(stream: TokenStream) -> None:
    batch = Windows(stream, SEQ, PAD).batch(np.arange(6))
    parts = list(batch.split(4))
    assert [p.tokens.shape[0] for p in parts] == [4, 2]
    total = sum(to_inputs(p, torch.float64, torch.device("cpu")).token_weights.sum() for p in parts)
    assert float(total) == pytest.approx(1.0, abs=1e-15)


def test_validation_is_always_the_same(stream: TokenStream) -> None:
    windows = Windows(stream, SEQ, PAD)
    tokens = torch.cat([b.tokens for b in validation_batches(windows, 5, 2)])
    assert torch.equal(tokens, windows.batch(np.arange(5)).tokens)
    assert sum(b.tokens.shape[0] for b in validation_batches(windows, 0, 4)) == len(windows)
