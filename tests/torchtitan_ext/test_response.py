"""erc's matrix taken on the way: the library function's values and gradients, and what else comes back untouched."""

import itertools

import pytest
import torch

from torchtitan_ext.losses import expert_router_coupling_loss
from torchtitan_ext.ops import native
from torchtitan_ext.ops.response import (
    coupling_excess,
    coupling_matrix,
    coupling_noise_bound,
    lengths,
    response_through,
)

EXPERTS, WIDTH = 5, 4
DIM, KERNEL_DIM = 3, 48  # the kernels take multiples of 16


def make(
    dtype: torch.dtype = torch.float64, experts: int = EXPERTS, width: int = WIDTH, dim: int = DIM
) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, 2 * width, dim, dtype=torch.float64, generator=source)
    weight[3, :width] = 0.0  # an expert that answers nothing
    router = torch.randn(experts, dim, dtype=torch.float64, generator=source)
    return weight.to(dtype).requires_grad_(), router.requires_grad_()


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("vectors", "experts", "width", "dim"), [(16, 4, 24, 16), (5, 4, 7, 48), (35, 4, 61, 32), (1, 5, 1, 64)]
)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_kernels_equal_pytorch(
    vectors: int, experts: int, width: int, dim: int, share: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors, rows and widths that fill tiles, and that don't; experts of one rank, and vectors of all; a share of the answers
    with a gradient, since the kernels pass over those without."""
    source = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    proxies = torch.randn(vectors, dim, dtype=wide, generator=source).requires_grad_()
    weight = make(dtype, experts, width, dim)[0]
    other = torch.randn(weight.shape, dtype=wide, generator=source).to(dtype)
    pull = torch.randn(vectors, experts, dtype=wide, generator=source)
    pull *= torch.rand(vectors, experts, generator=source) < share

    def both() -> list[torch.Tensor]:
        through, squares = response_through(weight, proxies, width)
        kernels.append(squares.grad_fn.by_kernel)  # type: ignore[union-attr]
        gradients = torch.autograd.grad([through, squares], [weight, proxies], [other.clone(), pull])
        return [squares, *gradients]

    kernels: list[bool] = []
    found = both()
    monkeypatch.setattr(native, "direct", lambda *_, **__: False)
    wanted = both()
    assert kernels == [True, False]
    # Sums of dim, vectors, or experts x width products: n roundings of at most 16 n eps in all, relative to the largest sum.
    terms = max(dim, vectors, experts * width)
    for name, got, want in zip(("squares", "weight", "proxies"), found, wanted, strict=True):
        tolerance = 16 * terms * torch.finfo(wide).eps
        if name == "weight":
            tolerance = max(tolerance, torch.finfo(dtype).eps)
        assert got.dtype == want.dtype
        largest = float(want.detach().abs().max())
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
def test_a_gradient_that_is_not_a_number_is_not_passed_over() -> None:
    weight, router = make(dim=KERNEL_DIM)
    through, squares = response_through(weight, router, WIDTH)
    pull = torch.zeros_like(squares)
    pull[1, 2] = torch.nan
    of_weight, of_router = torch.autograd.grad([through, squares], [weight, router], [torch.zeros_like(weight), pull])
    assert of_weight.isnan().any(2).any(1).tolist() == [expert == 2 for expert in range(EXPERTS)]
    assert of_router.isnan().any(1).tolist() == [vector == 1 for vector in range(EXPERTS)]


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("experts", "dim"), [(2, 1), (5, 7), (16, 48), (33, 20)])
def test_the_small_kernels_equal_pytorch(
    experts: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also equal routing vectors, zero ones, answers that are equal, none, or not a number."""
    source = torch.Generator().manual_seed(2)
    router = torch.randn(experts, dim, dtype=dtype, generator=source)
    same, zero, broken = router.clone(), router.clone(), router.clone()
    same[1], zero[0], broken[0, -1] = same[0], 0.0, float("nan")
    matrix = torch.rand(experts, experts, dtype=dtype, generator=source)
    flat, none, bad = torch.ones_like(matrix), torch.zeros_like(matrix), matrix.clone()
    bad[0, 1] = float("nan")

    def all_of_it() -> list[torch.Tensor]:
        found = [coupling_noise_bound(weight) for weight in (router, router.t().contiguous().t(), same, zero, broken)]
        for answers, alpha in itertools.product((matrix, matrix.t(), flat, none), (0.0, 0.7, 1.0, 1.3)):
            leaf = answers.clone().requires_grad_()
            value = coupling_excess(leaf, alpha)
            found += [value, *torch.autograd.grad(value, leaf)]
        return [*found, coupling_excess(bad, 0.9)]

    found = all_of_it()
    monkeypatch.setattr(native, "direct", lambda *_, **__: False)
    wanted = all_of_it()
    eps = torch.finfo(dtype).eps
    for got, want in zip(found, wanted, strict=True):  # sums of dim squares, or of twice E (E - 1) numbers of one sign
        torch.testing.assert_close(
            got, want, rtol=2 * max(dim, 2 * experts**2) * eps, atol=4 * experts * eps, equal_nan=True
        )


@pytest.mark.parametrize("dim", [DIM, KERNEL_DIM])
@pytest.mark.parametrize("used", ["both", "matrix", "weight"])
def test_equals_the_library_function(used: str, dim: int) -> None:
    weight, router = make(dim=dim)
    other = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    through, squares = response_through(weight, router, WIDTH)
    matrix = lengths(squares)
    torch.testing.assert_close(matrix, coupling_matrix(router, weight[:, :WIDTH]), rtol=1e-13, atol=1e-14)
    uses = {"matrix": (1.0, 0.0), "weight": (0.0, 1.0), "both": (1.0, 1.0)}[used]
    value = uses[0] * coupling_excess(matrix, 0.9) if uses[0] else 0.0
    value = value + (uses[1] * (through * other).sum() if uses[1] else 0.0)
    got = torch.autograd.grad(value, [weight, router], allow_unused=True)
    weight, router = make(dim=dim)
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


@pytest.mark.parametrize("dim", [DIM, KERNEL_DIM])
def test_a_detached_router_gets_no_gradient(dim: int) -> None:
    weight, router = make(dim=dim)
    _, squares = response_through(weight, router.detach(), WIDTH)
    matrix = lengths(squares)
    coupling_excess(matrix, 0.9).backward()
    assert weight.grad is not None
    assert router.grad is None
