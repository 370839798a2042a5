"""Placement of experts on ranks: it recovers known clusters, never increases traffic, and permuting experts keeps
outputs."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.commands import titan_moe
from tests.helpers.ranks import launch
from tests.helpers.runs import train
from tests.helpers.steps import BASE, VOCABULARY, batch_of, config_of, mesh_of
from titan_moe.analysis.place.placement import (
    assign,
    in_order,
    order_by_paths,
    order_of,
    place,
    round_robin,
    source_by_first_router,
    source_in_order,
    traffic,
)
from titan_moe.checkpoint.chosen import chosen_checkpoints, from_checkpoint
from titan_moe.checkpoint.expert_order import permute_experts, read_order, write_order
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.errors import UserError
from titan_moe.model.gemm import local
from titan_moe.parallel.mesh import single
from titan_moe.train.build import build_model
from titan_moe.train.inputs import to_inputs

N, L, E, R = 24, 3, 8, 4


def clustered_routing(noise: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of R kinds, each kind routed to its E / R experts of every layer, plus uniform noise.

    Returns counts (N, L, E), joint (L - 1, E, E) and the kind of every expert (L, E)."""
    random = np.random.default_rng(0)
    kinds = np.stack([random.permutation(np.repeat(np.arange(R), E // R)) for _ in range(L)])
    counts = random.integers(0, noise + 1, (N, L, E))
    for n in range(N):
        counts[n] += np.where(kinds == n % R, 10, 0)
    joint = np.stack([sum(np.outer(c[layer], c[layer + 1]) for c in counts) for layer in range(L - 1)])
    return counts, joint, kinds


def test_place_recovers_clusters_of_sequences_and_experts() -> None:
    counts, joint, kinds = clustered_routing()
    rank_of = place(counts, joint, R)
    source_rank = source_by_first_router(counts, rank_of)
    assert traffic(counts, rank_of, source_rank) == (0.0, [0.0] * L, 1.0)
    for layer in range(L):
        assert len({(a, b) for a, b in zip(kinds[layer], rank_of[layer], strict=True)}) == R
    assert traffic(counts, round_robin(L, E, R), source_in_order(N, R)).share > 0.5


@pytest.mark.parametrize("noise", [1, 5, 30])
def test_place_sends_no_more_rows_than_round_robin_on_the_fitted_text(noise: int) -> None:
    counts, joint, _ = clustered_routing(noise)
    rank_of = place(counts, joint, R)
    interleaved = round_robin(L, E, R)
    ours = traffic(counts, rank_of, source_by_first_router(counts, rank_of)).share
    assert ours <= traffic(counts, interleaved, source_by_first_router(counts, interleaved)).share
    assert (np.stack([(rank_of == rank).sum(1) for rank in range(R)]) == E // R).all()


def test_assignments_have_the_largest_gain_of_all_balanced_assignments() -> None:
    """Compared with every balanced assignment of six experts to three ranks, and of six sequences to two."""
    random = np.random.default_rng(1)
    gain = random.integers(0, 50, (6, 3))
    best = max(
        sum(gain[e, r] for e, r in enumerate(assignment))
        for assignment in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    )
    assert gain[np.arange(6), assign(gain)].sum() == best
    counts = random.integers(0, 50, (6, 2, 4))
    rank_of = in_order(2, 4, 2)
    source_rank = source_by_first_router(counts, rank_of)
    local_rows = [[counts[n, 0, rank_of[0] == r].sum() for r in range(2)] for n in range(6)]
    assignments = set(itertools.permutations([0, 0, 0, 1, 1, 1]))
    assert sum(local_rows[n][r] for n, r in enumerate(source_rank)) == max(
        sum(local_rows[n][r] for n, r in enumerate(assignment)) for assignment in assignments
    )
    assert sorted(source_rank) == [0, 0, 0, 1, 1, 1]


def test_traffic_is_the_fraction_of_rows_on_another_rank_than_their_source() -> None:
    counts = np.array([[[3, 1]], [[0, 4]]])
    measured = traffic(counts, np.array([[0, 1]]), np.array([0, 1]))
    assert measured.share == pytest.approx(1 / 8)
    assert measured.load == pytest.approx(5 / 4)
    assert traffic(counts, np.array([[1, 0]]), np.array([0, 1])).share == pytest.approx(7 / 8)


def test_order_of_and_order_by_paths_on_small_examples() -> None:
    assert order_of(np.array([[1, 0, 1, 0]])).tolist() == [[1, 3, 0, 2]]
    assert order_by_paths([[2, 0, 1], [1, 2, 0]]).tolist() == [[0, 1, 2], [2, 0, 1], [0, 1, 2]]


def test_place_refuses_ranks_that_do_not_divide_the_experts_and_too_few_sequences() -> None:
    counts, joint, _ = clustered_routing()
    for ranks in (3, 1):
        with pytest.raises(UserError, match=r"must divide model\.moe\.experts = 8"):
            place(counts, joint, ranks)
    with pytest.raises(UserError, match="only 2 sequences"):
        place(counts[:2], joint, 4)


def permutation(layers: int, experts: int) -> np.ndarray:
    random = np.random.default_rng(3)
    return np.stack([random.permutation(experts) for _ in range(layers)])


def local_parameters_after_permuting(words: list[str], world: int) -> list[torch.Tensor]:
    """This rank's shards of the parameters of a model after permuting its experts."""
    config = config_of([*BASE, "--model.moe.score=sigmoid", *words], world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    for moe in model.moe_modules():
        moe.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, 8))
    permute_experts(model, permutation(3, 8))
    return [local(p).detach().clone() for p in model.parameters()]


def test_permuting_experts_changes_expert_ids_and_no_output() -> None:
    config = config_of([*BASE, "--model.moe.score=sigmoid"], 1)
    model = build_model(config, VOCABULARY, single(torch.device("cpu")))
    for moe in model.moe_modules():
        moe.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, 8))
    inputs = to_inputs(batch_of(1), torch.float64, torch.device("cpu"))
    with torch.no_grad():
        logits = model.logits(inputs)
        before = model.evaluate(inputs)[2]
        order = permutation(3, 8)
        permute_experts(model, order)
        torch.testing.assert_close(model.logits(inputs), logits, rtol=1e-12, atol=1e-12)
        for layer, (old, new) in enumerate(zip(before, model.evaluate(inputs)[2], strict=True)):
            assert torch.equal(torch.from_numpy(order[layer])[new].sort(1).values, old.sort(1).values)
            assert not torch.equal(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--parallelism.ep=2"], ["--parallelism.tp=2"], []], ids=["ep2", "tp2", "dp2"])
def test_permuting_experts_on_two_ranks_gives_the_shards_of_the_permuted_parameters(words: list[str]) -> None:
    both = launch(2, local_parameters_after_permuting, words, 2)
    alone = local_parameters_after_permuting([], 1)
    for first, second, full in zip(*both, alone, strict=True):
        if first.shape == full.shape:
            assert torch.equal(first, full)
            continue
        dim = next(d for d in range(full.dim()) if first.shape[d] != full.shape[d])
        assert torch.equal(torch.cat([first, second], dim), full)


def test_expert_order_files_round_trip_and_bad_ones_are_refused(tmp_path: Path) -> None:
    order = permutation(3, 8)
    write_order(tmp_path / "a.json", order, note="x")
    assert np.array_equal(read_order(tmp_path / "a.json", 3, 8), order)
    with pytest.raises(UserError, match="not an order of 9 experts in 3 layers"):
        read_order(tmp_path / "a.json", 3, 9)
    order[0, 0] = order[0, 1]
    write_order(tmp_path / "b.json", order)
    for name, text in (("b.json", None), ("c.json", "{"), ("d.json", "[]"), ("e.json", None)):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"checkpoint\.expert_order: .*not an order"):
            read_order(tmp_path / name, 3, 8)


@pytest.mark.slow
def test_place_writes_orders_that_training_starts_from(run: Path, tmp_path: Path) -> None:
    done = titan_moe("place", str(run), "--ranks=2", f"--output={tmp_path / 'order.json'}")
    assert done.returncode == 0, done.stderr
    assert "path-aware" in done.stdout
    raw = json.loads((tmp_path / "order.json").read_text())
    by_placement = raw["traffic"]
    aware, interleaved = (
        by_placement[f"{name}, sequences by first router"]["fitted"]["share"] for name in ("path-aware", "round-robin")
    )
    assert aware <= interleaved
    done = titan_moe("place", str(run), "--by-paths")
    assert done.returncode == 0, done.stderr
    checkpoint = chosen_checkpoints([run], every=False)[0]
    _, config = from_checkpoint([checkpoint], False, [], 1)
    start = config.checkpoint.model_copy(
        update={"load_path": str(checkpoint), "expert_order": str(run / "order-by-paths.json"), "interval": 0}
    )
    job = config.job.model_copy(update={"name": "reordered", "output_dir": str(tmp_path)})
    reordered = config.model_copy(update={"checkpoint": start, "job": job})
    rows = train(reordered)
    unpermuted = train(
        reordered.model_copy(
            update={
                "checkpoint": start.model_copy(update={"expert_order": ""}),
                "job": job.model_copy(update={"name": "plain"}),
            }
        )
    )
    assert rows[0]["loss"] == pytest.approx(unpermuted[0]["loss"], rel=1e-9)
    assert RunDir(reordered).saved_steps() == [6]
    done = titan_moe("train", "--config=debug", f"--checkpoint.expert_order={tmp_path / 'order.json'}", "--check")
    assert (done.returncode, "checkpoint.load_path, which is not set" in done.stderr) == (2, True)
