"""The specialization loss against its definition written as plain loops, values and gradients, in float64."""

import pytest
import torch

from tests.helpers import reference
from tests.helpers.losses import KS, TOKENS, WIDTH, assert_same, generator
from torchtitan_ext.losses import (
    specialization_loss,
)


@pytest.mark.parametrize("k", KS)
def test_specialization_equals_its_definition(k: int) -> None:
    z = torch.randn(TOKENS, k, WIDTH, dtype=torch.float64, generator=generator(k)).requires_grad_()
    assert_same(specialization_loss, reference.specialization, z)
    assert 0.0 <= specialization_loss(z).item() <= k * (k - 1)


@pytest.mark.parametrize("k", KS)
def test_specialization_above_chance_equals_its_definition(k: int) -> None:
    """Squared cosines below 1/F have no gradient; the test has pairs below and above."""
    z = torch.randn(TOKENS, k, WIDTH, dtype=torch.float64, generator=generator(1)).requires_grad_()
    assert_same(
        lambda z: specialization_loss(z, above_chance=True), lambda z: reference.specialization(z, 1 / WIDTH), z
    )
    if k == 2:
        per_token = [specialization_loss(z[i : i + 1], above_chance=True).item() for i in range(TOKENS)]
        assert 0 < per_token.count(0.0) < TOKENS


def test_specialization_is_maximal_for_equal_and_0_for_orthogonal_experts() -> None:
    z = torch.ones(3, 4, WIDTH, dtype=torch.float64)
    assert specialization_loss(z).item() == pytest.approx(12.0, rel=1e-14)
    assert specialization_loss(torch.eye(4, dtype=torch.float64).expand(3, 4, 4)).item() == 0.0


def test_a_zero_activation_has_cosine_and_gradient_zero() -> None:
    z = torch.randn(TOKENS, 4, WIDTH, dtype=torch.float64, generator=generator(5))
    z[1, 2] = 0.0
    z[4] = 0.0
    z.requires_grad_()
    assert_same(specialization_loss, reference.specialization, z)
    (grad,) = torch.autograd.grad(specialization_loss(z), z)
    assert not grad[1, 2].any()
    assert not grad[4].any()


def test_specialization_does_not_depend_on_the_order_of_rows() -> None:
    z = torch.randn(TOKENS, 3, WIDTH, dtype=torch.float64, generator=generator(6))
    order = torch.randperm(TOKENS * 3, generator=generator(7))
    shuffled = torch.empty(TOKENS * 3, WIDTH, dtype=torch.float64)
    shuffled[order] = z.reshape(-1, WIDTH)
    rows = order.reshape(TOKENS, 3)
    torch.testing.assert_close(specialization_loss(shuffled, rows=rows), specialization_loss(z), rtol=1e-14, atol=0)


def test_gradients_of_down_projections_have_the_cosines_of_activations() -> None:
    """Proposition 4.1, per token: gradients of two experts' down projections have the cosine of their activations."""
    k, width, dim = 3, 7, 4
    x = torch.randn(k, width, dtype=torch.float64, generator=generator(10))
    down = [
        torch.randn(dim, width, dtype=torch.float64, generator=generator(20 + e)).requires_grad_() for e in range(k)
    ]
    gates = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    loss = torch.tanh(sum(gates[e] * down[e] @ x[e] for e in range(k))).pow(3).sum()
    grads = [g.flatten() for g in torch.autograd.grad(loss, down)]
    for e in range(k):
        for v in range(k):
            ours = torch.cosine_similarity(grads[e], grads[v], dim=0)
            torch.testing.assert_close(ours, torch.cosine_similarity(x[e], x[v], dim=0), rtol=1e-12, atol=1e-13)
