"""Measures for analysis: planted structure comes out as planted, and noise as chance."""

import itertools

import numpy as np
import pytest
import torch

from torchtitan_ext.losses import routing_variance_loss
from torchtitan_ext.metrics import (
    balanced_clusters,
    cluster_agreement,
    conditional_routing,
    coupling_kappa,
    domain_information,
    domain_load,
    expert_overlap,
    expert_response,
    knn_overlap,
    load_variation,
    match_experts,
    mean_gate_imbalance,
    routing_margin,
    routing_persistence,
    routing_silhouette,
    topk_mass,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kappa_of_a_planted_permutation_is_one_and_of_noise_is_chance() -> None:
    experts, tokens = 16, 20_000
    ids = torch.randint(experts, (tokens,), generator=generator())
    permutation = torch.randperm(experts, generator=generator(1))
    assert coupling_kappa(ids, permutation[ids], experts) == 1.0
    noise = torch.randint(experts, (tokens,), generator=generator(2))
    # Each of the E^2 cells holds 1/E^2 of the tokens with deviation sqrt(1/E^2 / T); a matching takes E of them.
    assert 1 / experts <= coupling_kappa(ids, noise, experts) < 1 / experts + 4 * (1 / tokens) ** 0.5


def test_identical_and_independent_layers() -> None:
    """A layer like the one before: every measure of agreement is whole. One that knows nothing of it: each is at chance."""
    experts, tokens = 8, 40_000
    ids = torch.stack([torch.randperm(experts, generator=generator(n))[:2] for n in range(500)]).repeat(
        tokens // 500, 1
    )
    other = ids[torch.randperm(tokens, generator=generator(9))]
    cond = conditional_routing(ids, ids, experts)
    assert torch.equal(cond.diagonal(), torch.ones(experts, dtype=torch.float64))
    assert coupling_kappa(ids[:, 0], ids[:, 0], experts) == 1.0
    assert routing_persistence(ids, ids) == (1.0, 1.0)
    share = ids[:, 0].bincount().double() / tokens
    load = domain_load(ids[:, :1], ids[:, 0], experts, experts)
    assert domain_information(load) == pytest.approx(torch.special.entr(share).sum().item(), rel=1e-9)
    # Independent: cond[e, v] is v's share of the tokens, with deviation sqrt(p (1 - p) / n) for the n tokens of e.
    shares = torch.bincount(other.flatten(), minlength=experts).double() / tokens
    deviation = (0.25 / torch.bincount(ids.flatten()).min()) ** 0.5
    assert (conditional_routing(ids, other, experts) - shares).abs().max() < 5 * deviation
    chance = match_experts(torch.outer(ids[:, 0].bincount().double(), other[:, 0].bincount().double()))[1]
    assert abs(coupling_kappa(ids[:, 0], other[:, 0], experts) - chance) < 0.02
    assert routing_persistence(ids, other).topk == pytest.approx(2 / experts, abs=0.02)
    assert domain_information(domain_load(ids, other[:, 0], experts, experts)) < 0.005


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 7])
def test_kappa_is_the_best_over_all_permutations(experts: int) -> None:
    joint = torch.randint(20, (experts, experts), generator=generator())
    ways = itertools.permutations(range(experts))
    best = max(sum(int(joint[e, pi[e]]) for e in range(experts)) for pi in ways)
    columns, share = match_experts(joint)
    assert share == best / int(joint.sum())
    assert sum(int(joint[e, v]) for e, v in enumerate(columns)) == best
    assert match_experts(torch.zeros(3, 3))[1] == 0.0


def test_kappa_with_an_expert_that_no_token_reached() -> None:
    assert coupling_kappa(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0]), 5) == 1.0


def test_persistence() -> None:
    before = torch.tensor([[0, 1], [2, 3], [4, 5]])
    after = torch.tensor([[0, 1], [3, 2], [6, 7]])
    found = routing_persistence(before, after)
    assert found.top1 == pytest.approx(1 / 3)
    assert found.topk == pytest.approx(2 / 3)


def planted(groups: int, each: int, width: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(groups).repeat_interleave(each)
    centres = 10 * torch.randn(groups, width, generator=generator(3))
    return centres[labels] + spread * torch.randn(len(labels), width, generator=generator(4)), labels


def test_silhouette_and_neighbours_of_planted_groups_and_of_noise() -> None:
    points, labels = planted(6, 40, 8, 0.1)
    assert routing_silhouette(points, labels) > 0.95
    assert knn_overlap(points, labels) == 0.0
    shuffled = labels[torch.randperm(len(labels), generator=generator(5))]
    assert routing_silhouette(points, shuffled) < 0.05
    assert knn_overlap(points, shuffled) == pytest.approx(1 - 1 / 6, abs=0.05)


def test_silhouette_is_its_definition() -> None:
    points = torch.randn(30, 3, dtype=torch.float64, generator=generator())
    labels = torch.arange(30) % 3
    distances = torch.cdist(points, points)
    values = []
    for i in range(30):
        means = [distances[i, (labels == g) & (torch.arange(30) != i)].mean().item() for g in range(3)]
        own, other = means[labels[i]], min(m for g, m in enumerate(means) if g != labels[i])
        values.append((other - own) / max(own, other))
    assert routing_silhouette(points, labels) == pytest.approx(np.mean(values), rel=1e-9)


def test_clusters_are_balanced_and_planted_ones_are_found() -> None:
    points, labels = planted(5, 21, 4, 0.1)
    found = balanced_clusters(points, 5)
    assert np.bincount(found).tolist() == [21] * 5
    assert match_experts(torch.from_numpy(np.histogram2d(labels.numpy(), found, bins=5)[0]))[1] == 1.0
    uneven = balanced_clusters(points[:50], 7)
    assert (uneven >= 0).all()
    assert np.bincount(uneven).max() <= 8


def test_clusters_agree_where_one_layer_is_the_other_rotated() -> None:
    points, _ = planted(4, 25, 6, 0.1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator(6))).Q
    noise = torch.randn(100, 6, generator=generator(7))
    same, other = cluster_agreement([points, points @ rotation, noise], 4)
    assert same == 1.0
    assert other < 0.5


def test_domains() -> None:
    ids = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
    load = domain_load(ids, torch.tensor([0, 0, 1, 1]), 5, 2)
    assert load.tolist() == [[2, 2, 0, 0, 0], [0, 0, 2, 2, 0]]
    assert domain_information(load) == pytest.approx(np.log(2))
    assert domain_information(torch.tensor([[3, 1], [3, 1]])) == pytest.approx(0.0, abs=1e-12)
    assert domain_information(torch.zeros(2, 3)) == 0.0


def test_mass_margin_overlap_and_imbalance() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]], dtype=torch.float64)
    assert topk_mass(2 * scores, torch.tensor([[0, 1], [0, 2]])).item() == pytest.approx(0.75)
    assert routing_margin(3 * scores, 1).item() == pytest.approx(0.25)
    assert routing_margin(scores, 2).item() == pytest.approx(0.15)
    with pytest.raises(ValueError, match="no score is left out"):
        routing_margin(scores, 3)
    x = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]])
    assert expert_overlap(x).item() == pytest.approx(0.25)
    assert expert_overlap(x.flatten(0, 1), torch.arange(4).reshape(2, 2)).item() == pytest.approx(0.25)
    assert expert_overlap(x[:, :1]).item() == 0.0
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert mean_gate_imbalance(gates).item() == 0.0
    assert -routing_variance_loss(gates).item() == 0.25  # balanced, and far from constant over tokens
    assert mean_gate_imbalance(gates[:1]).item() == 0.25


def test_load_variation() -> None:
    assert load_variation(torch.tensor([[2, 2], [4, 0], [0, 0]])).tolist() == [0.0, 1.0, 0.0]


def test_expert_response_of_experts_that_answer_only_their_own_vector() -> None:
    router = torch.eye(3, 4)
    gate = torch.einsum("ed,f->efd", router, torch.ones(2))
    assert expert_response(router, gate).tolist() == torch.eye(3).tolist()
