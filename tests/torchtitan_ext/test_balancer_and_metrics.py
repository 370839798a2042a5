"""The balancing bias, the measures that are taken at every step, and an entropy bound."""

import math

import pytest
import torch

from tests.helpers.losses import EXPERTS, generator
from torchtitan_ext.balancer import update_expert_bias
from torchtitan_ext.metrics import conditional_routing, dead_fraction, max_vio, routing_entropy, token_entropy


def test_the_bias_changes_by_the_rate_against_the_load() -> None:
    bias = torch.zeros(4)
    update_expert_bias(bias, torch.tensor([10, 2, 4, 4]), 0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    update_expert_bias(bias, torch.tensor([5, 5, 5, 5]), 0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_a_centered_bias_has_mean_zero() -> None:
    bias = torch.zeros(4)
    update_expert_bias(bias, torch.tensor([10, 2, 4, 4]), 0.5, center=True)
    assert bias.tolist() == [-0.75, 0.25, 0.25, 0.25]


def test_max_vio_and_dead_experts_of_small_examples() -> None:
    counts = torch.tensor([[4, 0, 2, 2], [2, 2, 2, 2], [0, 0, 0, 0]])
    assert max_vio(counts).tolist() == [1.0, 0.0, 0.0]
    assert dead_fraction(counts).tolist() == [0.25, 0.0, 1.0]


def test_entropy_of_uniform_and_one_hot_routing() -> None:
    torch.testing.assert_close(routing_entropy(torch.ones(3, 8)), torch.log(torch.tensor(8.0)))
    assert routing_entropy(torch.eye(4)).item() == 0.0


def test_conditional_routing_of_a_permutation_of_experts() -> None:
    earlier = torch.tensor([[0], [1], [2], [0], [1]])
    later = (earlier + 1) % 3
    cond = conditional_routing(earlier, later, 4)
    assert cond.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    masked = conditional_routing(earlier, later, 4, torch.tensor([True, False, False, False, False]))
    assert masked.sum().item() == 1.0


@pytest.mark.parametrize("delta", [0.01, 0.1, 0.3, 0.5])
def test_entropy_is_bounded_as_corollary_c3_says(delta: float) -> None:
    """If the largest gate is at least 1 - delta, H <= h(delta) + delta log(E - 1), with equality for equal other
    gates."""
    bound = -delta * math.log(delta) - (1 - delta) * math.log(1 - delta) + delta * math.log(EXPERTS - 1)
    rest = torch.rand(50, EXPERTS - 1, dtype=torch.float64, generator=generator(8))
    leftover = delta * torch.rand(50, 1, dtype=torch.float64, generator=generator(9))
    gates = torch.cat([1 - leftover, rest / rest.sum(1, keepdim=True) * leftover], dim=1)
    assert bool((token_entropy(gates) <= bound + 1e-12).all())
    extreme = torch.full((1, EXPERTS), delta / (EXPERTS - 1), dtype=torch.float64)
    extreme[0, 0] = 1 - delta
    assert token_entropy(extreme).item() == pytest.approx(bound, rel=1e-12)
