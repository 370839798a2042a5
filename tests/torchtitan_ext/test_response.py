"""erc's matrix taken on the way: the library function's values and gradients, and what else comes back untouched."""

import pytest
import torch

from torchtitan_ext.losses import coupling_excess, coupling_matrix, expert_router_coupling_loss
from torchtitan_ext.response import lengths, response_through

EXPERTS, WIDTH, DIM = 5, 4, 3


def make(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS, 2 * WIDTH, DIM, dtype=torch.float64, generator=source)
    weight[3, :WIDTH] = 0.0  # an expert that answers nothing
    router = torch.randn(EXPERTS, DIM, dtype=torch.float64, generator=source)
    return weight.to(dtype).requires_grad_(), router.requires_grad_()


@pytest.mark.parametrize("used", ["both", "matrix", "weight"])
def test_equals_the_library_function(used: str) -> None:
    weight, router = make()
    other = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    through, squares = response_through(weight, router, WIDTH)
    matrix = lengths(squares)
    torch.testing.assert_close(matrix, coupling_matrix(router, weight[:, :WIDTH]), rtol=1e-13, atol=1e-14)
    uses = {"matrix": (1.0, 0.0), "weight": (0.0, 1.0), "both": (1.0, 1.0)}[used]
    value = uses[0] * coupling_excess(matrix, 0.9) if uses[0] else 0.0
    value = value + (uses[1] * (through * other).sum() if uses[1] else 0.0)
    got = torch.autograd.grad(value, [weight, router], allow_unused=True)
    weight, router = make()
    noise = torch.ones_like(router)
    plain = (
        uses[0] * expert_router_coupling_loss(router, weight[:, :WIDTH], 0.9, noise) + uses[1] * (weight * other).sum()
    )
    wanted = torch.autograd.grad(plain, [weight, router])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.zeros_like(router) if got[1] is None else got[1], wanted[1], rtol=1e-12, atol=1e-14
    )


def test_bfloat16_weights() -> None:
    """Rounded inputs, float32 arithmetic, one rounding of the gradient (2^-9 relative; 2^-8 is allowed)."""
    weight, router = make(torch.bfloat16)
    router32 = router.detach().float().requires_grad_()
    _, squares = response_through(weight, router32, WIDTH)
    matrix = lengths(squares)
    got = torch.autograd.grad(coupling_excess(matrix, 0.9), [weight, router32])
    wide = weight.detach().float().requires_grad_()
    wanted = torch.autograd.grad(coupling_excess(coupling_matrix(router32, wide[:, :WIDTH]), 0.9), [wide, router32])
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0].float(), wanted[0], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-6)


def test_a_detached_router_gets_no_gradient() -> None:
    weight, router = make()
    _, squares = response_through(weight, router.detach(), WIDTH)
    matrix = lengths(squares)
    coupling_excess(matrix, 0.9).backward()
    assert weight.grad is not None
    assert router.grad is None
