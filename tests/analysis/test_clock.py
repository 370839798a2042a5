"""The simulated clock: hand-computed cases of rows, links and products, and what `place --card` prints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.commands import titan_moe
from titan_moe.analysis.place.clock import (
    BUCKETS,
    PATH_AWARE,
    ROUND_ROBIN,
    Machine,
    Work,
    batch_time,
    batches_of,
    clock,
    exchange_seconds,
    machine_of,
    rows_between,
    work_of,
)
from titan_moe.analysis.place.placement import in_order
from titan_moe.config.load import load_config
from titan_moe.errors import UserError
from titan_moe.estimate.counts import count, meta_model
from titan_moe.runtime.cards import Card

CARD = Card(bfloat16=1000.0, memory=100.0, link=10.0, network=2.0)
WORK = Work(dim=3, hidden=2, seq_len=5, other_flops=7.0, other_weights=11.0, router_flops=4.0)


def test_rows_between_ranks_by_hand() -> None:
    """Two sequences, one layer, four experts on two ranks."""
    counts = np.array([[[3, 1, 2, 0]], [[0, 4, 1, 5]]])
    rows = rows_between(counts, np.array([[0, 1, 0, 1]]), np.array([0, 1]), 2)
    assert rows.tolist() == [[[5, 1], [1, 9]]]
    swapped = rows_between(counts, np.array([[0, 1, 0, 1]]), np.array([1, 0]), 2)
    assert swapped.tolist() == [[[1, 9], [5, 1]]]


def test_an_exchange_takes_as_long_as_its_busiest_link() -> None:
    """Four ranks. Row: sender. Bytes that stay are free. On one node rank 1 receives 20 + 30 + 40 = 90 at 10 per second.

    On two nodes of two, it receives 20 from its neighbour, and 30 + 40 from the other node at 2 per second."""
    sent = np.array([[999, 20, 5, 0], [0, 0, 0, 0], [0, 30, 0, 0], [0, 40, 0, 0]])
    assert exchange_seconds(sent, Machine("x", CARD, 4, 1, 1)) == pytest.approx(90 / 10)
    assert exchange_seconds(sent.T, Machine("x", CARD, 4, 1, 1)) == pytest.approx(90 / 10)
    assert exchange_seconds(sent, Machine("x", CARD, 4, 2, 1)) == pytest.approx(70 / 2)
    inside = np.array([[0, 20, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert exchange_seconds(inside, Machine("x", CARD, 4, 2, 1)) == pytest.approx(20 / 10)


def test_a_batch_by_hand() -> None:
    """Two layers on two ranks. A row is 3 * 2 + 4 = 10 bytes there and 3 * 2 = 6 back; an expert has 3 * 3 * 2 = 18 numbers."""
    rows = np.array([[[5, 1], [2, 9]], [[0, 100], [0, 0]]])
    machine = Machine("x", CARD, 2, 1, 1)
    time = batch_time(rows, machine, WORK, experts_per_rank=2.0, buckets=True)
    assert time.crossing == (1 + 2 + 100) * 16
    assert time.busiest == (10 + 100) / 2
    assert time.exchange == pytest.approx((2 + 100) * (10 + 6) / 10)
    # Layer 1: 10 rows * 36 FLOPs / 1000 = 0.36 s, but reading 2 * 18 numbers of 2 bytes takes 0.72 s. Layer 2: 3.6 s.
    assert time.experts == pytest.approx(0.72 + 3.6)
    assert time.other == pytest.approx(max(5 * 7 / 1000, 11 * 2 / 100))
    assert time.buckets == pytest.approx(5 * 4 / 1000)
    assert time.seconds == pytest.approx(time.exchange + time.experts + time.other + time.buckets)
    assert batch_time(rows, machine, WORK, 2.0, buckets=False).buckets == 0


def test_batches_are_the_next_sequences_of_every_rank() -> None:
    machine = Machine("x", CARD, 2, 1, 2)
    found = batches_of(np.array([0, 1, 1, 0, 1, 0, 0, 1, 0]), machine)
    assert [batch.tolist() for batch in found] == [[0, 3, 1, 2], [5, 6, 4, 7]]


def test_clustered_sequences_send_nothing_with_buckets_and_gain_nothing_from_placement_alone() -> None:
    """Sequence n uses only the experts of kind n // 2 % 2: kind 0 has experts 0 and 1, kind 1 has 2 and 3. Placed by kind, all
    rows stay where the sequence is on its kind's rank; in turn, half of the sequences are on the other one."""
    kinds = np.arange(16) // 2 % 2
    counts = np.where(np.arange(4)[None] // 2 == kinds[:, None], 10, 0)[:, None, :].repeat(3, axis=1)
    machine = Machine("x", CARD, 2, 1, 2)
    times = clock(counts, in_order(3, 4, 2), machine, WORK)
    crossing = {arm: {one.crossing for one in batches} for arm, batches in times.items()}
    row_bytes = 16
    # A batch has 2 sequences of each kind with 20 rows in each of 3 layers, half of them for each expert of the kind.
    assert crossing == {ROUND_ROBIN: {4 * 30 * row_bytes}, PATH_AWARE: {4 * 30 * row_bytes}, BUCKETS: {0}}
    assert {one.busiest for one in times[BUCKETS]} == {40}
    with pytest.raises(UserError, match="too few for a batch of 2 ranks"):
        clock(counts[:3], in_order(3, 4, 2), machine, WORK)


@pytest.mark.parametrize("first_dense", [0, 1])
def test_the_work_besides_routed_experts_is_what_is_left_of_the_forward_pass(first_dense: int) -> None:
    config = load_config("nano", [f"--model.moe.first_dense_layers={first_dense}", "--model.moe.shared_experts=1"])
    work = work_of(config, 512)
    model = config.model.model_copy(update={"vocab_size": 512})
    whole = count(meta_model(model, torch.bfloat16), 256).flops_per_token / 3
    routed = (4 - first_dense) * 4 * 3 * 2 * 128 * 64
    assert work.other_flops == pytest.approx(whole - routed)
    attention = 4 * 128 * 128
    dense = first_dense * (3 * 128 * model.moe.dense_width + attention)
    scores = (1 + first_dense) * meta_model(model, torch.bfloat16).blocks()[0].attention.score_flops(256) / 3
    assert work.router_flops == pytest.approx(2 * (attention + 32 * 128 + dense) + scores)


def test_ranks_that_do_not_fit_their_nodes_are_refused() -> None:
    for ranks, nodes in ((8, 3), (16, 1)):
        with pytest.raises(UserError, match=f"--nodes = {nodes}: {ranks} ranks"):
            machine_of("H100", CARD, ranks, nodes, 1)


def test_a_clock_without_a_placement_on_ranks_and_unknown_cards_are_refused(tmp_path: Path) -> None:
    refused = titan_moe("place", str(tmp_path), "--card=H100", "--by-paths")
    assert (refused.returncode, "leave one of the two out" in refused.stderr) == (2, True)
    refused = titan_moe("place", str(tmp_path), "--card=abacus")
    assert (refused.returncode, "--card = 'abacus' is not in the table" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_place_prints_the_clock_and_its_assumptions(run: Path, tmp_path: Path) -> None:
    words = ["--card=h100", "--ranks=4", "--nodes=2", f"--output={tmp_path / 'order.json'}"]
    done = titan_moe("place", str(run), *words, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "simulated forward pass by the data sheet of h100: 4 cards on 2 nodes" in " ".join(done.stdout.split())
    assert "assumed: h100: 989 TFLOP/s in bfloat16" in done.stdout
    written = json.loads((tmp_path / "order.json").read_text())
    assert written["ranks"] == 4
    assert [*written["clock"]] == [ROUND_ROBIN, PATH_AWARE, BUCKETS]
    assert written["clock"][BUCKETS]["crossing"] > 0
