"""Placement: planted paths are found, nothing gets worse, and experts under other numbers are the same network."""

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
from titan_moe.analysis.inspect.inspection import chosen_checkpoints, from_checkpoint
from titan_moe.analysis.place.placement import (
    assign,
    homes_by_first_router,
    homes_in_order,
    in_order,
    order_by_paths,
    order_of,
    place,
    round_robin,
    traffic,
)
from titan_moe.checkpoint.expert_order import permute_experts, read_order, write_order
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.errors import UserError
from titan_moe.model.gemm import local
from titan_moe.parallel.mesh import single
from titan_moe.train.build import build_model
from titan_moe.train.inputs import to_inputs

N, L, E, R = 24, 3, 8, 4


def planted(noise: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of R kinds; each kind uses E / R experts of every layer, others under every layer's own numbers: counts
    (N, L, E), joint (L - 1, E, E), kind of every expert (L, E)."""
    dice = np.random.default_rng(0)
    kinds = np.stack([dice.permutation(np.repeat(np.arange(R), E // R)) for _ in range(L)])
    counts = dice.integers(0, noise + 1, (N, L, E))
    for n in range(N):
        counts[n] += np.where(kinds == n % R, 10, 0)
    joint = np.stack([sum(np.outer(c[layer], c[layer + 1]) for c in counts) for layer in range(L - 1)])
    return counts, joint, kinds


def test_planted_paths_are_found() -> None:
    counts, joint, kinds = planted()
    rank_of = place(counts, joint, R)
    homes = homes_by_first_router(counts, rank_of)
    assert traffic(counts, rank_of, homes) == (0.0, [0.0] * L, 1.0)
    for layer in range(L):
        assert len({(a, b) for a, b in zip(kinds[layer], rank_of[layer], strict=True)}) == R
    assert traffic(counts, round_robin(L, E, R), homes_in_order(N, R)).share > 0.5


@pytest.mark.parametrize("noise", [1, 5, 30])
def test_never_above_round_robin_on_the_fitted_text(noise: int) -> None:
    counts, joint, _ = planted(noise)
    rank_of = place(counts, joint, R)
    dealt = round_robin(L, E, R)
    ours = traffic(counts, rank_of, homes_by_first_router(counts, rank_of)).share
    assert ours <= traffic(counts, dealt, homes_by_first_router(counts, dealt)).share
    assert (np.stack([(rank_of == rank).sum(1) for rank in range(R)]) == E // R).all()


def test_assignments_are_the_best_of_all() -> None:
    """Against every balanced assignment of six experts to three ranks, and of six sequences to two."""
    dice = np.random.default_rng(1)
    gain = dice.integers(0, 50, (6, 3))
    best = max(sum(gain[e, r] for e, r in enumerate(way)) for way in set(itertools.permutations([0, 0, 1, 1, 2, 2])))
    assert gain[np.arange(6), assign(gain)].sum() == best
    counts = dice.integers(0, 50, (6, 2, 4))
    rank_of = in_order(2, 4, 2)
    homes = homes_by_first_router(counts, rank_of)
    local_rows = [[counts[n, 0, rank_of[0] == r].sum() for r in range(2)] for n in range(6)]
    ways = set(itertools.permutations([0, 0, 0, 1, 1, 1]))
    assert sum(local_rows[n][r] for n, r in enumerate(homes)) == max(
        sum(local_rows[n][r] for n, r in enumerate(way)) for way in ways
    )
    assert sorted(homes) == [0, 0, 0, 1, 1, 1]


def test_traffic_counts_rows_elsewhere() -> None:
    counts = np.array([[[3, 1]], [[0, 4]]])
    found = traffic(counts, np.array([[0, 1]]), np.array([0, 1]))
    assert found.share == pytest.approx(1 / 8)
    assert found.load == pytest.approx(5 / 4)
    assert traffic(counts, np.array([[1, 0]]), np.array([0, 1])).share == pytest.approx(7 / 8)


def test_orders() -> None:
    assert order_of(np.array([[1, 0, 1, 0]])).tolist() == [[1, 3, 0, 2]]
    assert order_by_paths([[2, 0, 1], [1, 2, 0]]).tolist() == [[0, 1, 2], [2, 0, 1], [0, 1, 2]]


def test_ranks_that_cannot_be() -> None:
    counts, joint, _ = planted()
    for ranks in (3, 1):
        with pytest.raises(UserError, match=r"must divide model\.moe\.experts = 8"):
            place(counts, joint, ranks)
    with pytest.raises(UserError, match="only 2 sequences"):
        place(counts[:2], joint, 4)


def permutation(layers: int, experts: int) -> np.ndarray:
    dice = np.random.default_rng(3)
    return np.stack([dice.permutation(experts) for _ in range(layers)])


def permuted_parameters(words: list[str], world: int) -> tuple[float, list[torch.Tensor]]:
    """The loss of a model whose experts got other numbers, and its parts of the parameters."""
    config = config_of([*BASE, "--model.moe.score=sigmoid", *words], world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    for moe in model.moe_modules():
        moe.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, 8))
    if words is not None:
        permute_experts(model, permutation(3, 8))
    return 0.0, [local(p).detach().clone() for p in model.parameters()]


def test_other_numbers_leave_the_outputs() -> None:
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
def test_on_two_ranks_each_gets_its_part(words: list[str]) -> None:
    both = launch(2, permuted_parameters, words, 2)
    (_, alone) = permuted_parameters([], 1)
    for first, second, whole in zip(both[0][1], both[1][1], alone, strict=True):
        if first.shape == whole.shape:
            assert torch.equal(first, whole)
            continue
        dim = next(d for d in range(whole.dim()) if first.shape[d] != whole.shape[d])
        assert torch.equal(torch.cat([first, second], dim), whole)


def test_files_of_orders(tmp_path: Path) -> None:
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
def test_place_and_train_on(run: Path, tmp_path: Path) -> None:
    done = titan_moe("place", str(run), "--ranks=2", f"--output={tmp_path / 'order.json'}")
    assert done.returncode == 0, done.stderr
    assert "path-aware" in done.stdout
    raw = json.loads((tmp_path / "order.json").read_text())
    arms = raw["traffic"]
    aware, dealt = (
        arms[f"{name}, sequences by first router"]["fitted"]["share"] for name in ("path-aware", "round-robin")
    )
    assert aware <= dealt
    done = titan_moe("place", str(run), "--by-paths")
    assert done.returncode == 0, done.stderr
    checkpoint = chosen_checkpoints([run], every=False)[0]
    _, config = from_checkpoint([checkpoint], False, [], 1)
    start = config.checkpoint.model_copy(
        update={"load_path": str(checkpoint), "expert_order": str(run / "order-by-paths.json"), "interval": 0}
    )
    job = config.job.model_copy(update={"name": "reordered", "output_dir": str(tmp_path)})
    fresh = config.model_copy(update={"checkpoint": start, "job": job})
    found = train(fresh)
    again = train(
        fresh.model_copy(
            update={
                "checkpoint": start.model_copy(update={"expert_order": ""}),
                "job": job.model_copy(update={"name": "plain"}),
            }
        )
    )
    assert found[0]["loss"] == pytest.approx(again[0]["loss"], rel=1e-9)
    assert RunDir(fresh).saved_steps() == [6]
    done = titan_moe("train", "--config=debug", f"--checkpoint.expert_order={tmp_path / 'order.json'}", "--check")
    assert (done.returncode, "checkpoint.load_path, which is not set" in done.stderr) == (2, True)
