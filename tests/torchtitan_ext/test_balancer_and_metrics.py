"""The balancing bias and the cheap measures."""

import torch

from torchtitan_ext.balancer import update_expert_bias
from torchtitan_ext.metrics import conditional_routing, dead_share, max_vio, routing_entropy


def test_bias_moves_against_the_load_by_its_rate() -> None:
    bias = torch.zeros(4)
    update_expert_bias(bias, torch.tensor([10, 2, 4, 4]), 0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    update_expert_bias(bias, torch.tensor([5, 5, 5, 5]), 0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_centered_bias_has_mean_zero() -> None:
    bias = torch.zeros(4)
    update_expert_bias(bias, torch.tensor([10, 2, 4, 4]), 0.5, center=True)
    assert bias.tolist() == [-0.75, 0.25, 0.25, 0.25]


def test_max_vio_and_dead() -> None:
    counts = torch.tensor([[4, 0, 2, 2], [2, 2, 2, 2], [0, 0, 0, 0]])
    assert max_vio(counts).tolist() == [1.0, 0.0, 0.0]
    assert dead_share(counts).tolist() == [0.25, 0.0, 1.0]


def test_entropy_of_uniform_and_one_hot_routing() -> None:
    torch.testing.assert_close(routing_entropy(torch.ones(3, 8)), torch.log(torch.tensor(8.0)))
    assert routing_entropy(torch.eye(4)).item() == 0.0


def test_conditional_routing_of_a_planted_permutation() -> None:
    earlier = torch.tensor([[0], [1], [2], [0], [1]])
    later = (earlier + 1) % 3
    cond = conditional_routing(earlier, later, 4)
    assert cond.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    masked = conditional_routing(earlier, later, 4, torch.tensor([True, False, False, False, False]))
    assert masked.sum().item() == 1.0
