"""Keyed random numbers, and the two estimators of sp: unbiased in value and gradient, with the variance of theory."""

import pytest
import torch
from torch import Tensor

from torchtitan_ext.losses import sketched_specialization_loss, specialization_loss
from torchtitan_ext.ops import draws

CPU = torch.device("cpu")
DRAWS, TOKENS, K, WIDTH, SKETCH = 100, 128, 4, 48, 64


def test_random_numbers_depend_only_on_their_key() -> None:
    rows, columns = torch.arange(5), torch.arange(7)
    all_rows = draws.keyed_uniform(1, 2, rows_B=rows, columns_S=columns, device=CPU)
    assert torch.equal(all_rows[3:4], draws.keyed_uniform(1, 2, rows_B=rows[3:4], columns_S=columns, device=CPU))
    assert not torch.equal(all_rows, draws.keyed_uniform(1, 3, rows_B=rows, columns_S=columns, device=CPU))
    signs = draws.keyed_signs(1, 2, rows, width=40, device=CPU)
    assert torch.equal(signs[3:4], draws.keyed_signs(1, 2, rows[3:4], width=40, device=CPU))


def test_random_numbers_are_uniform_and_uncorrelated() -> None:
    """n = 100,000: means within four standard errors, 4 / sqrt(12 n) and 4 / sqrt(n)."""
    n = 100_000
    rows, columns = torch.arange(n // 100), torch.arange(100)
    u = draws.keyed_uniform(0, rows_B=rows, columns_S=columns, device=CPU, dtype=torch.float64).flatten()
    assert 0.0 <= u.min().item() < u.max().item() < 1.0
    assert u.mean().item() == pytest.approx(0.5, abs=4 / (12 * n) ** 0.5)
    assert ((u - 0.5) ** 2).mean().item() == pytest.approx(1 / 12, abs=4 * (1 / 180 / n) ** 0.5)
    for lag in (1, 2, 32):
        assert abs(((u[:-lag] - 0.5) * (u[lag:] - 0.5)).mean().item()) < 4 / 12 / n**0.5
    signs = draws.keyed_signs(0, torch.arange(n // 100), width=100, device=CPU, dtype=torch.float64)
    assert abs(signs.mean().item()) < 4 / n**0.5
    assert abs((signs[:, 1:] * signs[:, :-1]).mean().item()) < 4 / n**0.5


def correlated() -> Tensor:
    """Activations of experts with a common component, so that cosines are above chance."""
    source = torch.Generator().manual_seed(0)
    z = torch.randn(TOKENS, K, WIDTH, dtype=torch.float64, generator=source)
    return z + torch.randn(TOKENS, 1, WIDTH, dtype=torch.float64, generator=source)


def sketched(z: Tensor, draw: int) -> Tensor:
    rows = torch.arange(TOKENS * K).reshape(TOKENS, K)
    signs = draws.keyed_signs(draw, 0, torch.arange(TOKENS), width=WIDTH, device=CPU, dtype=torch.float64)
    sketch = draws.keyed_signs(draw, 1, torch.arange(SKETCH), width=WIDTH, device=CPU, dtype=torch.float64)
    return sketched_specialization_loss(z.reshape(-1, WIDTH), rows, sketch, signs)


def sampled(z: Tensor, draw: int) -> Tensor:
    drawn = draws.sample(1 / 8, draw, rows_B=torch.tensor([0]), columns_S=torch.arange(TOKENS), device=CPU)
    return specialization_loss(z[drawn], weights=torch.full(drawn.shape, 8 / TOKENS, dtype=torch.float64))


@pytest.mark.parametrize("estimate", [sketched, sampled], ids=["sketch", "sample"])
def test_estimators_are_unbiased_in_value_and_gradient(estimate) -> None:  # type: ignore[no-untyped-def]
    z = correlated().requires_grad_()
    exact = specialization_loss(z)
    (exact_grad,) = torch.autograd.grad(exact, z)
    probe = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, slopes = [], []
    for draw in range(DRAWS):
        value = estimate(z, draw)
        (grad,) = torch.autograd.grad(value, z)
        values.append(value.item())
        slopes.append((grad * exact_grad).sum().item() + 0.1 * (grad * probe).sum().item())
    wanted = (exact_grad * exact_grad).sum().item() + 0.1 * (exact_grad * probe).sum().item()
    for sampled_values, true in ((values, exact.item()), (slopes, wanted)):
        sample = torch.tensor(sampled_values, dtype=torch.float64)
        error = sample.std().item() / DRAWS**0.5
        assert abs(sample.mean().item() - true) < 2 * error


def test_the_sampling_estimator_has_the_standard_deviation_of_theory() -> None:
    """Bernoulli(p) tokens at weight 1/p: variance (1 - p) / p * sum_i v_i^2 / T^2. The standard
    deviation of n samples has a relative standard error of 1/sqrt(2n)."""
    z = correlated()
    per_token = torch.stack([specialization_loss(z[i : i + 1]) for i in range(TOKENS)])
    wanted = (7 * per_token.square().sum()).sqrt().item() / TOKENS
    values = torch.stack([sampled(z, draw) for draw in range(DRAWS)])
    assert values.std().item() == pytest.approx(wanted, rel=4 / (2 * DRAWS) ** 0.5)


def test_the_sketching_estimator_has_the_standard_deviation_of_theory() -> None:
    """For h = m/2 rows of signs, an estimate of a cosine c has variance V = (1 + c^2 - 2 sum (ab)^2) / h, and the
    product of two independent estimates V^2 + 2 c^2 V. Variances of tokens and of pairs add up; each pair counts
    twice."""
    z = correlated()
    unit = z / z.norm(dim=2, keepdim=True)
    products = unit.unsqueeze(2) * unit.unsqueeze(1)
    cosine = products.sum(3)
    variance = (1 + cosine**2 - 2 * products.square().sum(3)) / (SKETCH // 2)
    squared = variance**2 + 2 * cosine**2 * variance
    upper = torch.triu(torch.ones(K, K, dtype=torch.bool), 1)
    # Pairs with a common expert are correlated. At correlation 1 the standard deviation of a token is the sum over
    # pairs.
    independent = (4 * squared[:, upper].sum(1)).sum().sqrt().item() / TOKENS
    dependent = (2 * squared[:, upper].sqrt().sum(1)).square().sum().sqrt().item() / TOKENS
    values = torch.stack([sketched(z, draw) for draw in range(DRAWS)])
    slack = 4 / (2 * DRAWS) ** 0.5
    assert independent * (1 - slack) < values.std().item() < dependent * (1 + slack)


def test_an_odd_sketch_is_refused() -> None:
    with pytest.raises(ValueError, match="halved"):
        sketched_specialization_loss(torch.ones(2, 4), torch.tensor([[0, 1]]), torch.ones(3, 4), torch.ones(1, 4))
