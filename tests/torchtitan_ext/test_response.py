"""`response_through` and the kernels of erc: values and gradients of the loss function, and of PyTorch operations."""

import itertools

import pytest
import torch

from torchtitan_ext.losses import expert_router_coupling_loss
from torchtitan_ext.ops import native, select
from torchtitan_ext.ops.response import (
    coupling_excess,
    coupling_matrix,
    coupling_noise_bound,
    response_through,
    safe_sqrt,
)

EXPERTS, WIDTH = 5, 4
DIM, KERNEL_DIM = 3, 48  # the kernels need multiples of 16


def make(
    dtype: torch.dtype = torch.float64, experts: int = EXPERTS, width: int = WIDTH, dim: int = DIM
) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, 2 * width, dim, dtype=torch.float64, generator=source)
    weight[3, :width] = 0.0  # an expert whose response is 0
    router = torch.randn(experts, dim, dtype=torch.float64, generator=source)
    return weight.to(dtype).requires_grad_(), router.requires_grad_()


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("vectors", "experts", "width", "dim"), [(16, 4, 24, 16), (5, 4, 7, 48), (35, 4, 61, 32), (1, 5, 1, 64)]
)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_kernels_equal_pytorch_operations(
    vectors: int, experts: int, width: int, dim: int, share: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that fill the kernels' tiles and that don't; as many vectors as experts, and more or fewer.

    share: fraction of the responses with a gradient; the kernels skip those without."""
    source = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    proxies = torch.randn(vectors, dim, dtype=wide, generator=source).requires_grad_()
    weight = make(dtype, experts, width, dim)[0]
    other = torch.randn(weight.shape, dtype=wide, generator=source).to(dtype)
    gradient_of_squares = torch.randn(vectors, experts, dtype=wide, generator=source)
    gradient_of_squares *= torch.rand(vectors, experts, generator=source) < share

    def value_and_gradients() -> list[torch.Tensor]:
        through, squares = response_through(weight, proxies, width)
        kernels.append(squares.grad_fn.backward_kernel is not None)  # type: ignore[union-attr]
        gradients = torch.autograd.grad([through, squares], [weight, proxies], [other.clone(), gradient_of_squares])
        return [squares, *gradients]

    kernels: list[bool] = []
    by_kernel = value_and_gradients()
    monkeypatch.setattr(select, "KERNELS", ())
    wanted = value_and_gradients()
    assert kernels == [True, False]
    # Sums of dim, vectors, or experts x width products: n roundings, together at most 16 n eps of the largest sum.
    terms = max(dim, vectors, experts * width)
    for name, actual, want in zip(("squares", "weight", "proxies"), by_kernel, wanted, strict=True):
        tolerance = 16 * terms * torch.finfo(wide).eps
        if name == "weight":
            tolerance = max(tolerance, torch.finfo(dtype).eps)
        assert actual.dtype == want.dtype
        largest = float(want.detach().abs().max())
        torch.testing.assert_close(actual, want, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
def test_kernels_propagate_a_nan_gradient() -> None:
    weight, router = make(dim=KERNEL_DIM)
    through, squares = response_through(weight, router, WIDTH)
    gradient_of_squares = torch.zeros_like(squares)
    gradient_of_squares[1, 2] = torch.nan
    of_weight, of_router = torch.autograd.grad(
        [through, squares], [weight, router], [torch.zeros_like(weight), gradient_of_squares]
    )
    assert of_weight.isnan().any(2).any(1).tolist() == [expert == 2 for expert in range(EXPERTS)]
    assert of_router.isnan().any(1).tolist() == [vector == 1 for vector in range(EXPERTS)]


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("experts", "dim"), [(2, 1), (5, 7), (16, 48), (33, 20)])
def test_noise_bound_and_excess_kernels_equal_pytorch_operations(
    experts: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for equal and zero routing vectors, and for equal, zero and NaN entries of the matrix."""
    source = torch.Generator().manual_seed(2)
    router = torch.randn(experts, dim, dtype=dtype, generator=source)
    same, zero, broken = router.clone(), router.clone(), router.clone()
    same[1], zero[0], broken[0, -1] = same[0], 0.0, float("nan")
    matrix = torch.rand(experts, experts, dtype=dtype, generator=source)
    flat, none, bad = torch.ones_like(matrix), torch.zeros_like(matrix), matrix.clone()
    bad[0, 1] = float("nan")

    def values_and_gradients() -> list[torch.Tensor]:
        by_kernel = [
            coupling_noise_bound(weight) for weight in (router, router.t().contiguous().t(), same, zero, broken)
        ]
        for matrices, alpha in itertools.product((matrix, matrix.t(), flat, none), (0.0, 0.7, 1.0, 1.3)):
            leaf = matrices.clone().requires_grad_()
            value = coupling_excess(leaf, alpha)
            by_kernel += [value, *torch.autograd.grad(value, leaf)]
        return [*by_kernel, coupling_excess(bad, 0.9)]

    by_kernel = values_and_gradients()
    monkeypatch.setattr(select, "KERNELS", ())
    wanted = values_and_gradients()
    eps = torch.finfo(dtype).eps
    for actual, want in zip(
        by_kernel, wanted, strict=True
    ):  # sums of dim squares, or of 2 E (E - 1) numbers of one sign
        torch.testing.assert_close(
            actual, want, rtol=2 * max(dim, 2 * experts**2) * eps, atol=4 * experts * eps, equal_nan=True
        )


@pytest.mark.parametrize("dim", [DIM, KERNEL_DIM])
@pytest.mark.parametrize("used", ["both", "matrix", "weight"])
def test_value_and_gradients_equal_those_of_the_loss_function(used: str, dim: int) -> None:
    weight, router = make(dim=dim)
    other = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    through, squares = response_through(weight, router, WIDTH)
    matrix = safe_sqrt(squares)
    torch.testing.assert_close(matrix, coupling_matrix(router, weight[:, :WIDTH]), rtol=1e-13, atol=1e-14)
    uses = {"matrix": (1.0, 0.0), "weight": (0.0, 1.0), "both": (1.0, 1.0)}[used]
    value = uses[0] * coupling_excess(matrix, 0.9) if uses[0] else 0.0
    value = value + (uses[1] * (through * other).sum() if uses[1] else 0.0)
    actual = torch.autograd.grad(value, [weight, router], allow_unused=True)
    weight, router = make(dim=dim)
    noise = torch.ones_like(router)
    plain = (
        uses[0] * expert_router_coupling_loss(router, weight[:, :WIDTH], 0.9, noise) + uses[1] * (weight * other).sum()
    )
    wanted = torch.autograd.grad(plain, [weight, router])
    torch.testing.assert_close(actual[0], wanted[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.zeros_like(router) if actual[1] is None else actual[1], wanted[1], rtol=1e-12, atol=1e-14
    )


def test_bfloat16_weights_are_accumulated_in_float32() -> None:
    """Only the inputs and the final gradient are rounded (2^-9 relative; 2^-8 is allowed)."""
    weight, router = make(torch.bfloat16)
    router32 = router.detach().float().requires_grad_()
    _, squares = response_through(weight, router32, WIDTH)
    matrix = safe_sqrt(squares)
    actual = torch.autograd.grad(coupling_excess(matrix, 0.9), [weight, router32])
    wide = weight.detach().float().requires_grad_()
    wanted = torch.autograd.grad(coupling_excess(coupling_matrix(router32, wide[:, :WIDTH]), 0.9), [wide, router32])
    assert actual[0].dtype == torch.bfloat16
    torch.testing.assert_close(actual[0].float(), wanted[0], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [DIM, KERNEL_DIM])
def test_a_detached_router_gets_no_gradient(dim: int) -> None:
    weight, router = make(dim=dim)
    _, squares = response_through(weight, router.detach(), WIDTH)
    matrix = safe_sqrt(squares)
    coupling_excess(matrix, 0.9).backward()
    assert weight.grad is not None
    assert router.grad is None
