"""The Gram engine: derivatives by finite differences, and no dependence on how rows are sliced."""

import pytest
import torch

from torchtitan_ext import gram
from torchtitan_ext.gram import squared_cosines, token_gram


def make(tokens: int, k: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    z = torch.randn(tokens * k, width, dtype=torch.float64, generator=source)
    return z, torch.randperm(tokens * k, generator=source).reshape(tokens, k)


def test_first_and_second_derivatives() -> None:
    z, rows = make(3, 3, 4)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_gram(z, rows), (z,))
    assert torch.autograd.gradcheck(lambda z: squared_cosines(token_gram(z, rows)).sum(), (z,))
    assert torch.autograd.gradgradcheck(lambda z: squared_cosines(token_gram(z, rows)).sum(), (z,))


def test_slices_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    z, rows = make(50, 4, 8)
    whole = token_gram(z, rows)
    monkeypatch.setattr(gram, "SLICE_ELEMENTS", 100)
    assert len(gram._slices(rows, 8)) > 10
    z.requires_grad_()
    sliced = token_gram(z, rows)
    torch.testing.assert_close(sliced, whole, rtol=1e-14, atol=1e-14)
    weights = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (by_slices,) = torch.autograd.grad((sliced * weights).sum(), z)
    x = z.detach()[rows].requires_grad_()
    (at_once,) = torch.autograd.grad((x @ x.transpose(1, 2) * weights).sum(), x)
    torch.testing.assert_close(by_slices[rows], at_once, rtol=1e-13, atol=1e-14)


def test_rows_that_no_token_uses_get_gradient_zero() -> None:
    z, rows = make(4, 2, 3)
    z.requires_grad_()
    token_gram(z, rows[:2]).sum().backward()
    assert z.grad is not None
    assert not z.grad[rows[2:].flatten()].any()
    assert z.grad[rows[:2].flatten()].any()
