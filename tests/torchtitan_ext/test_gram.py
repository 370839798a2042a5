"""Gram matrices and squared cosines: derivatives by finite differences, kernels compared with PyTorch, slicing."""

from pathlib import Path

import pytest
import torch

from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops import draws, gram, native, select
from torchtitan_ext.ops.gram import squared_cosines, token_gram


def make(tokens: int, k: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    z = torch.randn(tokens * k, width, dtype=torch.float64, generator=source)
    return z, torch.randperm(tokens * k, generator=source).reshape(tokens, k)


def test_first_and_second_derivatives_by_finite_differences() -> None:
    z, rows = make(3, 3, 4)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_gram(z, rows), (z,))
    assert torch.autograd.gradcheck(lambda z: squared_cosines(token_gram(z, rows)).sum(), (z,))
    assert torch.autograd.gradgradcheck(lambda z: squared_cosines(token_gram(z, rows)).sum(), (z,))


def test_the_slice_size_does_not_change_values_or_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    z, rows = make(50, 4, 8)
    unsliced = token_gram(z, rows)
    monkeypatch.setattr(select, "KERNELS", ())
    monkeypatch.setattr(gram, "SLICE_ELEMENTS", 100)
    assert len(gram._slices(rows, 8)) > 10
    z.requires_grad_()
    sliced = token_gram(z, rows)
    torch.testing.assert_close(sliced, unsliced, rtol=1e-14, atol=1e-14)
    weights = torch.randn(unsliced.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (by_slices,) = torch.autograd.grad((sliced * weights).sum(), z)
    x = z.detach()[rows].requires_grad_()
    (at_once,) = torch.autograd.grad((x @ x.transpose(1, 2) * weights).sum(), x)
    torch.testing.assert_close(by_slices[rows], at_once, rtol=1e-13, atol=1e-14)


def test_rows_of_no_token_get_gradient_zero() -> None:
    z, rows = make(4, 2, 3)
    z.requires_grad_()
    token_gram(z, rows[:2]).sum().backward()
    assert z.grad is not None
    assert not z.grad[rows[2:].flatten()].any()
    assert z.grad[rows[:2].flatten()].any()


needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "k", "width"), [(37, 1, 9), (37, 2, 8), (20, 4, 67), (11, 6, 40), (3, 9, 5), (0, 2, 4)]
)
def test_kernels_equal_pytorch_operations(tokens: int, k: int, width: int, dtype: torch.dtype) -> None:
    z, rows = make(tokens + 1, k, width)  # the rows of the last token are not used
    z, rows = z.to(dtype), rows[:tokens]
    wide = accumulation_dtype(dtype)
    # Sums of n products of numbers up to 4, in another order: n roundings, together at most 16 n eps.
    tolerance = 16 * width * torch.finfo(wide).eps
    products, _ = torch.ops.torchtitan_ext.token_gram(z, rows)
    torch.testing.assert_close(products, gram._products(z, rows)[0], rtol=tolerance, atol=tolerance)
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    coefficients = torch.randn(tokens, k, k, dtype=wide, generator=torch.Generator().manual_seed(1))
    wanted, unscaled = grad.to(wide), torch.empty(0)
    for part_rows, part in gram._gradients(z.to(wide), rows, coefficients, unscaled):
        wanted.index_add_(0, part_rows, part)
    torch.ops.torchtitan_ext.add_gram_gradient(grad, z, rows, coefficients, unscaled)
    tolerance = max(16 * k * torch.finfo(wide).eps, torch.finfo(dtype).eps / 2)  # and one rounding to the dtype of z
    torch.testing.assert_close(grad.to(wide), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("by_kernel", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_squared_cosines_and_their_precomputed_gradient_equal_autograd(
    k: int, floor: float, dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for zero rows, and for matrices that are not symmetric, since entries ab and ba are independent."""
    monkeypatch.setattr(select, "KERNELS", (native,) if by_kernel else ())
    z, rows = make(40, k, 6)
    z[rows[3, 0]] = 0.0
    grams = gram._products(z, rows)[0].to(dtype)
    grams[5] += torch.rand(k, k, dtype=dtype, generator=torch.Generator().manual_seed(4))
    for layout in (grams, grams.transpose(1, 2)):
        computed, wanted = (layout.detach().requires_grad_() for _ in range(2))
        value = squared_cosines(computed, floor)
        assert value.grad_fn is not None
        assert "_SquaredCosines" in value.grad_fn.name()
        reference = gram._squared_cosines(wanted, floor)
        tolerance = 16 * k * torch.finfo(dtype).eps
        torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance)
        weights = torch.randn(40, dtype=dtype, generator=torch.Generator().manual_seed(5))
        (gradient,) = torch.autograd.grad((value * weights).sum(), computed)
        (expected,) = torch.autograd.grad((reference * weights).sum(), wanted)
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
        assert not gradient[3].any() or k > 2


@pytest.mark.parametrize("by_kernel", [pytest.param(True, marks=needs_compiler), False])
def test_squared_cosines_propagate_nan(by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "KERNELS", (native,) if by_kernel else ())
    grams = torch.full((2, 3, 3), float("nan")).requires_grad_()
    assert squared_cosines(grams, 0.1).isnan().all()


@needs_compiler
@pytest.mark.parametrize("share", [0.0, 0.1, 0.125, 1.0])
def test_the_kernel_samples_the_same_elements_as_pytorch_operations(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, rows, columns = torch.tensor(7), torch.tensor([5, 2**40, 0]), torch.arange(100, 1100)
    draw = lambda: draws.sample(share, 3, -1, step, rows_B=rows, columns_S=columns, device=torch.device("cpu"))  # noqa: E731
    sampled = draw()
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(sampled, draw())
    assert abs(len(sampled) / 3000 - share) < 5 * (share * (1 - share) / 3000) ** 0.5 + 1e-12


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_gives_the_same_uniform_numbers_as_pytorch_operations(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = {"rows_B": torch.tensor([5, 2**40, 0, -1]), "columns_S": torch.arange(0, 3000, 3)}
    draw = lambda: draws.keyed_uniform(3, torch.tensor(7), **ranges, device=torch.device("cpu"), dtype=dtype)  # noqa: E731
    uniform = draw()
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(uniform, draw())


@needs_compiler
def test_the_kernels_round_to_bfloat16_like_pytorch() -> None:
    bits = torch.arange(0, 2**32, 65537 // 8, dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    z = torch.ones(1, 1, dtype=torch.bfloat16).expand(len(values), 1).contiguous()
    grad = torch.full_like(z, -0.0)
    rows = torch.arange(len(values)).unsqueeze(1)
    torch.ops.torchtitan_ext.add_gram_gradient(grad, z, rows, values.reshape(-1, 1, 1), torch.empty(0))
    torch.testing.assert_close(grad.flatten(), values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    wide = torch.full(
        (16, 16), -0.0, dtype=torch.bfloat16
    )  # full SIMD vectors are rounded by other code than a remainder
    few = values[torch.arange(16) * (len(values) // 16)]
    ones = torch.ones(16, 16, dtype=torch.bfloat16)
    torch.ops.torchtitan_ext.add_gram_gradient(
        wide, ones, torch.arange(16).unsqueeze(1), few.reshape(-1, 1, 1), torch.empty(0)
    )
    torch.testing.assert_close(wide, few.to(torch.bfloat16).unsqueeze(1).expand(16, 16), rtol=0, atol=0, equal_nan=True)


def test_without_a_compiler_pytorch_operations_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    z, rows = make(5, 2, 3)
    wanted = token_gram(z, rows)
    native.library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    try:
        torch.testing.assert_close(token_gram(z, rows), wanted, rtol=1e-14, atol=1e-14)
        assert not native.supports("token_gram", z)
        assert len(caplog.records) == 1
        assert "slower" in caplog.text
    finally:
        native.library.cache_clear()
