"""Batches: every token is predicted once, documents stay separate, and every sequence is a function of (seed, step, index)."""

import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_moe.data import shards
from titan_moe.data.loader import (
    Batch,
    DataRank,
    StepData,
    TrainingLoader,
    Windows,
    permuted,
    step_windows,
    validation_batches,
)
from titan_moe.data.shards import Manifest, ShardWriter, TokenStream
from titan_moe.train.inputs import to_inputs

SEQ, PAD = 8, 0


def stream_of(folder: Path, documents: list[int], shard_tokens: int) -> TokenStream:
    """Documents of the given lengths in shards of `shard_tokens`. Token i of the stream has id 100 + i."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", shard_tokens)
        writer = ShardWriter(folder, "train", "uint16")
        start = 100
        for length in documents:
            writer.add(np.arange(start, start + length), domain=0, source_bytes=length)
            start += length
        split = writer.finish()
    assert len(split.shards) == -(-sum(documents) // shard_tokens)
    return TokenStream(folder, Manifest(1, "test", "", "uint16", [""], {"train": split}, ""), "train")


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return stream_of(tmp_path, [5, 1, 12, 30, 2, 7, 3, 16, 9], shard_tokens=20)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 1025])
def test_permutation(size: int) -> None:
    order = permuted(np.arange(size), size, key=5)
    assert sorted(order) == list(range(size))
    if size > 3:
        assert list(order) != list(permuted(np.arange(size), size, key=6))
        assert list(order) != list(range(size))
    one_by_one = [int(permuted(np.array([i]), size, key=5)[0]) for i in range(size)]
    assert one_by_one == list(order)


def test_permutation_moves_elements_as_far_as_a_uniform_one() -> None:
    """The mean displacement is n / 3 for a uniform permutation; its standard deviation over n elements is n / sqrt(18 n)."""
    n = 10_000
    shift = np.abs(permuted(np.arange(n), n, key=1) - np.arange(n)).mean()
    assert shift == pytest.approx(n / 3, abs=4 * n / (18 * n) ** 0.5)


def test_an_epoch_predicts_every_token_of_a_document_once(stream: TokenStream) -> None:
    windows = Windows(stream, SEQ, PAD)
    batch = windows.batch(np.arange(len(windows)))
    predicted = sorted(batch.labels[batch.loss_mask].tolist())
    firsts = set((100 + stream.starts).tolist())  # a document's first token is never a label
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


@given(
    documents=st.lists(st.integers(1, 12), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1),
    shard_tokens=st.integers(1, 40),
    seq_len=st.integers(1, 10),
    document_positions=st.booleans(),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_batches_follow_their_definition(
    documents: list[int], shard_tokens: int, seq_len: int, document_positions: bool, data: st.DataObject
) -> None:
    """Against one token at a time, for any documents, shards and windows (none, repeated and padded ones included). The
    label count, which is computed from boundaries, equals the number of labels in the mask."""
    with tempfile.TemporaryDirectory() as folder:
        stream = stream_of(Path(folder), documents, shard_tokens)
        windows = Windows(stream, seq_len, PAD, document_positions)
        chosen = data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=6))
        indices = np.array(chosen, dtype=np.int64)
        batch = windows.batch(indices)
    document_of = np.repeat(np.arange(len(documents)), documents)
    starts = np.cumsum(documents) - documents
    last = len(document_of) - 1
    assert windows.label_count(indices) == batch.label_count == int(batch.loss_mask.sum())
    for row, window in enumerate(chosen):
        for column in range(seq_len):
            at = window * seq_len + column
            document = int(document_of[at]) if at <= last else -1
            position = min(at - int(starts[document]), column) if document_positions else column
            assert int(batch.tokens[row, column]) == (100 + at if at <= last else PAD)
            assert int(batch.labels[row, column]) == (101 + at if at < last else PAD)
            assert bool(batch.loss_mask[row, column]) == (at < last and document_of[at + 1] == document)
            assert int(batch.document_ids[row, column]) == document
            assert int(batch.positions[row, column]) == (position if at <= last or not document_positions else 0)


def test_windows_of_a_step_are_a_function_of_seed_and_sample_number() -> None:
    count = 11
    flat = np.concatenate([step_windows(count, 4, 3, n) for n in range(9)])
    # Another batch size cuts the same order elsewhere; another seed gives another order.
    assert np.array_equal(flat, np.concatenate([step_windows(count, 6, 3, n) for n in range(6)]))
    assert not np.array_equal(flat, np.concatenate([step_windows(count, 4, 4, n) for n in range(9)]))
    # Every epoch is a permutation of its own.
    first, second = flat[:count], flat[count : 2 * count]
    assert sorted(first) == sorted(second) == list(range(count))
    assert list(first) != list(second)


def same(ours: Batch, theirs: Batch) -> bool:
    tensors = zip(ours[:6], theirs[:6], strict=True)
    return ours.label_count == theirs.label_count and all(torch.equal(one, other) for one, other in tensors)


def take(loader: TrainingLoader, first: int, count: int) -> list[StepData]:
    return [step for step, _ in zip(loader.steps(first), range(count), strict=False)]


@pytest.mark.parametrize(("size", "ranks"), [(12, 1), (4, 1), (6, 2), (2, 2), (1, 3), (3, 4)])
def test_ranks_divide_each_micro_step_among_them(stream: TokenStream, size: int, ranks: int) -> None:
    """Micro-step m is sequences m * size * ranks and on of the global batch, `size` of them on each rank; CRC included."""
    windows = Windows(stream, SEQ, PAD)
    whole = windows.batch(step_windows(len(windows), 12, 3, 2))
    micro_steps = whole.split(size * ranks)
    for rank in range(ranks):
        loader = TrainingLoader(windows, 12, 3, DataRank(size, rank, ranks), checksum=rank == 0)
        batches, data_crc = take(loader, 2, 1)[0]
        for batch, micro_step in zip(batches, micro_steps, strict=True):
            assert same(batch, micro_step.rows(slice(rank * size, rank * size + size)))
        assert data_crc == (zlib.crc32(whole.tokens.numpy().tobytes()) if rank == 0 else None)


def test_any_step_can_be_the_first(stream: TokenStream) -> None:
    loader = TrainingLoader(Windows(stream, SEQ, PAD), 4, 0, DataRank(2), checksum=True)
    all_steps, later = take(loader, 0, 8), take(loader, 5, 3)
    for ours, theirs in zip(later, all_steps[5:], strict=True):
        assert ours[1] == theirs[1] is not None
        assert all(map(same, ours[0], theirs[0]))


class CountingWindows(Windows):
    """Counts the batches that are built. The fifth one fails."""

    built = 0

    def batch(self, indices: npt.NDArray[np.int64], rows: npt.NDArray[np.int64] | slice = slice(None)) -> Batch:
        self.built += 1
        if self.built == 5:
            raise OSError("the disk is gone")
        return super().batch(indices, rows)


def test_prefetching_is_bounded_and_its_thread_ends(stream: TokenStream) -> None:
    windows = CountingWindows(stream, SEQ, PAD)
    before = threading.active_count()
    steps = TrainingLoader(windows, 4, 0, DataRank(4)).steps()
    assert threading.active_count() == before  # nothing is built before the first step is asked for
    next(steps)
    deadline = time.monotonic() + 30
    while windows.built < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # long enough for a third step ahead, if there were no bound
    assert windows.built == 3
    assert threading.active_count() == before + 1
    steps.close()
    assert threading.active_count() == before


def test_a_read_error_in_the_thread_stops_the_run(stream: TokenStream) -> None:
    steps = TrainingLoader(CountingWindows(stream, SEQ, PAD), 4, 0, DataRank(4)).steps()
    for _ in range(4):
        next(steps)
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_batches_are_the_same(stream: TokenStream) -> None:
    windows = Windows(stream, SEQ, PAD)
    plain, pinned = (take(TrainingLoader(windows, 4, 0, DataRank(2), pin=pin), 0, 3) for pin in (False, True))
    for (ours, _), (theirs, _) in zip(pinned, plain, strict=True):
        assert all(map(same, ours, theirs))
        assert all(tensor.is_pinned() for batch in ours for tensor in batch[:6])


def test_token_weights_of_all_micro_batches_sum_to_one(stream: TokenStream) -> None:
    parts = Windows(stream, SEQ, PAD).batch(np.arange(6)).split(4)
    assert [len(part.tokens) for part in parts] == [4, 2]
    total = sum(to_inputs(p, torch.float64, torch.device("cpu")).token_weights.sum() for p in parts)
    assert float(total) == pytest.approx(1.0, abs=1e-15)


def test_validation_reads_the_first_windows_in_order(stream: TokenStream) -> None:
    windows = Windows(stream, SEQ, PAD)
    tokens = torch.cat([b.tokens for b in validation_batches(windows, 5, DataRank(2))])
    assert torch.equal(tokens, windows.batch(np.arange(5)).tokens)
    assert sum(len(b.tokens) for b in validation_batches(windows, 0, DataRank(4))) == len(windows)


@pytest.mark.parametrize("count", [1, 5, 6, 0])
def test_validation_ranks_see_each_label_once(stream: TokenStream, count: int) -> None:
    """Every rank has `size` sequences in every batch. Those past the end of the text have no labels."""
    windows, size, ranks = Windows(stream, SEQ, PAD), 2, 3
    by_rank = [list(validation_batches(windows, count, DataRank(size, rank, ranks))) for rank in range(ranks)]
    labelled = []
    for parts in zip(*by_rank, strict=True):
        assert [len(part.tokens) for part in parts] == [size] * ranks
        assert {part.label_count for part in parts} == {sum(int(part.loss_mask.sum()) for part in parts)}
        for part in parts:
            assert torch.equal(part.tokens, windows.batch(part.sequences.numpy()).tokens)
            labelled += part.labels[part.loss_mask].tolist()
    whole = windows.batch(np.arange(count or len(windows)))
    assert labelled == whole.labels[whole.loss_mask].tolist()
