"""Measures for analysis: on data of known structure they have the known value, on noise the chance level."""

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


def test_kappa_is_1_for_a_permutation_of_experts_and_at_chance_for_noise() -> None:
    experts, tokens = 16, 20_000
    ids = torch.randint(experts, (tokens,), generator=generator())
    permutation = torch.randperm(experts, generator=generator(1))
    assert coupling_kappa(ids, permutation[ids], experts) == 1.0
    noise = torch.randint(experts, (tokens,), generator=generator(2))
    # Each of the E^2 pairs has a fraction 1/E^2 of the tokens with standard deviation sqrt(1/E^2 / T); a matching sums
    # E of them.
    assert 1 / experts <= coupling_kappa(ids, noise, experts) < 1 / experts + 4 * (1 / tokens) ** 0.5


def test_measures_of_agreement_are_1_for_identical_layers_and_at_chance_for_independent_ones() -> None:
    """Identical: the same choices in both layers. Independent: the choices of one layer in random order."""
    experts, tokens = 8, 40_000
    ids = torch.stack([torch.randperm(experts, generator=generator(n))[:2] for n in range(500)]).repeat(
        tokens // 500, 1
    )
    other = ids[torch.randperm(tokens, generator=generator(9))]
    cond = conditional_routing(ids, ids, experts)
    assert torch.equal(cond.diagonal(), torch.ones(experts, dtype=torch.float64))
    assert coupling_kappa(ids[:, 0], ids[:, 0], experts) == 1.0
    assert routing_persistence(ids, ids) == (1.0, 1.0)
    fraction = ids[:, 0].bincount().double() / tokens
    load = domain_load(ids[:, :1], ids[:, 0], experts, experts)
    assert domain_information(load) == pytest.approx(torch.special.entr(fraction).sum().item(), rel=1e-9)
    # Independent: cond[e, v] is p, v's fraction of the tokens, with standard deviation sqrt(p (1 - p) / n) for e's n
    # tokens.
    fractions = torch.bincount(other.flatten(), minlength=experts).double() / tokens
    deviation = (0.25 / torch.bincount(ids.flatten()).min()) ** 0.5
    assert (conditional_routing(ids, other, experts) - fractions).abs().max() < 5 * deviation
    chance = match_experts(torch.outer(ids[:, 0].bincount().double(), other[:, 0].bincount().double()))[1]
    assert abs(coupling_kappa(ids[:, 0], other[:, 0], experts) - chance) < 0.02
    assert routing_persistence(ids, other).topk == pytest.approx(2 / experts, abs=0.02)
    assert domain_information(domain_load(ids, other[:, 0], experts, experts)) < 0.005


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 7])
def test_match_experts_finds_the_best_of_all_permutations(experts: int) -> None:
    joint = torch.randint(20, (experts, experts), generator=generator())
    permutations = itertools.permutations(range(experts))
    best = max(sum(int(joint[e, pi[e]]) for e in range(experts)) for pi in permutations)
    columns, fraction = match_experts(joint)
    assert fraction == best / int(joint.sum())
    assert sum(int(joint[e, v]) for e, v in enumerate(columns)) == best
    assert match_experts(torch.zeros(3, 3))[1] == 0.0


def test_kappa_with_experts_without_tokens() -> None:
    assert coupling_kappa(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0]), 5) == 1.0


def test_persistence_of_a_small_example() -> None:
    before = torch.tensor([[0, 1], [2, 3], [4, 5]])
    after = torch.tensor([[0, 1], [3, 2], [6, 7]])
    persistence = routing_persistence(before, after)
    assert persistence.top1 == pytest.approx(1 / 3)
    assert persistence.topk == pytest.approx(2 / 3)


def clustered_points(groups: int, each: int, width: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around random centres, and the index of each point's centre."""
    labels = torch.arange(groups).repeat_interleave(each)
    centres = 10 * torch.randn(groups, width, generator=generator(3))
    return centres[labels] + spread * torch.randn(len(labels), width, generator=generator(4)), labels


def test_silhouette_and_neighbours_of_separate_clusters_and_of_shuffled_labels() -> None:
    points, labels = clustered_points(6, 40, 8, 0.1)
    assert routing_silhouette(points, labels) > 0.95
    assert knn_overlap(points, labels) == 0.0
    shuffled = labels[torch.randperm(len(labels), generator=generator(5))]
    assert routing_silhouette(points, shuffled) < 0.05
    assert knn_overlap(points, shuffled) == pytest.approx(1 - 1 / 6, abs=0.05)


def test_silhouette_equals_its_definition() -> None:
    points = torch.randn(30, 3, dtype=torch.float64, generator=generator())
    labels = torch.arange(30) % 3
    distances = torch.cdist(points, points)
    values = []
    for i in range(30):
        means = [distances[i, (labels == g) & (torch.arange(30) != i)].mean().item() for g in range(3)]
        inside, other = means[labels[i]], min(m for g, m in enumerate(means) if g != labels[i])
        values.append((other - inside) / max(inside, other))
    assert routing_silhouette(points, labels) == pytest.approx(np.mean(values), rel=1e-9)


def test_balanced_clusters_have_equal_sizes_and_recover_known_clusters() -> None:
    points, labels = clustered_points(5, 21, 4, 0.1)
    labels_found = balanced_clusters(points, 5)
    assert np.bincount(labels_found).tolist() == [21] * 5
    assert match_experts(torch.from_numpy(np.histogram2d(labels.numpy(), labels_found, bins=5)[0]))[1] == 1.0
    uneven = balanced_clusters(points[:50], 7)
    assert (uneven >= 0).all()
    assert np.bincount(uneven).max() <= 8


def test_cluster_agreement_is_1_under_a_rotation_and_low_for_noise() -> None:
    points, _ = clustered_points(4, 25, 6, 0.1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator(6))).Q
    noise = torch.randn(100, 6, generator=generator(7))
    same, other = cluster_agreement([points, points @ rotation, noise], 4)
    assert same == 1.0
    assert other < 0.5


def test_domain_load_and_information_of_small_examples() -> None:
    ids = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
    load = domain_load(ids, torch.tensor([0, 0, 1, 1]), 5, 2)
    assert load.tolist() == [[2, 2, 0, 0, 0], [0, 0, 2, 2, 0]]
    assert domain_information(load) == pytest.approx(np.log(2))
    assert domain_information(torch.tensor([[3, 1], [3, 1]])) == pytest.approx(0.0, abs=1e-12)
    assert domain_information(torch.zeros(2, 3)) == 0.0


def test_mass_margin_overlap_and_imbalance_of_small_examples() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]], dtype=torch.float64)
    assert topk_mass(2 * scores, torch.tensor([[0, 1], [0, 2]])).item() == pytest.approx(0.75)
    assert routing_margin(3 * scores, 1).item() == pytest.approx(0.25)
    assert routing_margin(scores, 2).item() == pytest.approx(0.15)
    with pytest.raises(ValueError, match="no expert is left out"):
        routing_margin(scores, 3)
    x = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]])
    assert expert_overlap(x).item() == pytest.approx(0.25)
    assert expert_overlap(x.flatten(0, 1), torch.arange(4).reshape(2, 2)).item() == pytest.approx(0.25)
    assert expert_overlap(x[:, :1]).item() == 0.0
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert mean_gate_imbalance(gates).item() == 0.0
    assert -routing_variance_loss(gates).item() == 0.25  # balanced on average, but not constant over tokens
    assert mean_gate_imbalance(gates[:1]).item() == 0.25


def test_load_variation_of_small_examples() -> None:
    assert load_variation(torch.tensor([[2, 2], [4, 0], [0, 0]])).tolist() == [0.0, 1.0, 0.0]


def test_expert_response_is_the_identity_for_orthogonal_experts() -> None:
    router = torch.eye(3, 4)
    gate = torch.einsum("ed,f->efd", router, torch.ones(2))
    assert expert_response(router, gate).tolist() == torch.eye(3).tolist()
