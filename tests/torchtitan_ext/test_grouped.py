"""Grouped products in tiles of bfloat16 (AMX), against float64 and against themselves on other threads and rows."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from torchtitan_ext.ops import native

pytestmark = pytest.mark.skipif(not native.tiles(), reason="this CPU has no tiles of bfloat16 (AMX), or no C compiler")

SIZES = {  # rows of the experts, N, D
    "multiples of the tile": ((32, 64, 32), 64, 96),
    "no multiple of anything": ((5, 0, 41, 17), 47, 83),
    "half a tile left": ((33, 1, 2), 48, 80),
    "odd sizes": ((3, 50), 17, 23),
    "more rows than are packed at once": ((0, 1100, 3), 40, 64),
    "more columns than are packed at once": ((70, 10), 300, 290),
    "one row": ((1,), 1, 1),
    "no row": ((0, 0), 32, 32),
}


class Case(NamedTuple):
    x_RD: Tensor
    weight_END: Tensor
    offsets_E: Tensor
    grad_RN: Tensor


def case_of(counts: Sequence[int], n: int, d: int, dtype: torch.dtype) -> Case:
    source = torch.Generator().manual_seed(0)
    rows, experts = sum(counts), len(counts)
    x = torch.randn(rows, d, generator=source).bfloat16()
    weight = torch.randn(experts, n, d, generator=source).to(dtype)
    offsets = torch.tensor(counts).cumsum(0).int()
    return Case(x, weight, offsets, torch.randn(rows, n, generator=source).bfloat16())


def products(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, offsets, grad = case
    return (
        native.grouped(x, weight, offsets),
        native.grouped_rows_gradient(grad, weight, offsets),
        native.grouped_weight_gradient(grad, x, offsets, weight.dtype),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_values_equal_float64(size: str, dtype: torch.dtype) -> None:
    """bfloat16: rounded once, 2^-8 of the value. Sums in float32: n additions are off by n 2^-24 times the sum of the
    absolute values of the summands."""
    case = case_of(*SIZES[size], dtype)
    x, weight, grad = case.x_RD.double(), case.weight_END.bfloat16().double(), case.grad_RN.double()
    start = 0
    for e, end in enumerate(case.offsets_E.tolist()):
        part = slice(start, start := end)
        factors = ((x[part], weight[e].t()), (grad[part], weight[e]), (grad[part].t(), x[part]))
        out, grad_x, grad_weight = products(case)
        for value, (a, b) in zip((out[part], grad_x[part], grad_weight[e]), factors, strict=True):
            wanted, length = a @ b, a.shape[1]
            rounding = 2**-8 if value.dtype == torch.bfloat16 else 0
            bound = rounding * wanted.abs() + length * 2**-24 * (a.abs() @ b.abs())
            assert ((value.double() - wanted).abs() <= bound).all()


def test_values_do_not_depend_on_threads_or_on_other_rows() -> None:
    """Bitwise."""
    case = case_of((40, 0, 700, 9), 96, 130, torch.bfloat16)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(products(case))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = Case(case.x_RD[740:], case.weight_END[3:], torch.tensor([9], dtype=torch.int32), case.grad_RN[740:])
    for a, b in zip(products(alone), found[0], strict=True):
        assert torch.equal(a, b[-len(a) :])


def test_nan_and_infinity_reach_their_own_rows_and_expert_only() -> None:
    """Also where a tile reads rows of the next expert, or is filled up with zeros."""
    clean = case_of((20, 7, 30), 40, 72, torch.bfloat16)
    dirty = Case(*(tensor.clone() for tensor in clean))
    dirty.x_RD[21, 3] = float("nan")
    dirty.grad_RN[22, 5] = float("inf")
    dirty.weight_END[1, 0, 0] = float("nan")
    for value, wanted, rows in zip(products(dirty), products(clean), ((20, 27), (20, 27), (1, 2)), strict=True):
        first, end = rows
        assert torch.equal(value[:first], wanted[:first])
        assert torch.equal(value[end:], wanted[end:])
        assert not value[first:end].isfinite().all()
    out = products(dirty)[0]
    assert out[21].isnan().all()
    assert out[20, 1:].isfinite().all()


def test_products_of_pytorch_before_and_after_are_the_same() -> None:
    """PyTorch's own bfloat16 products set up the same units in another way."""
    case = case_of((32, 64, 32), 64, 96, torch.bfloat16)
    a, b = torch.randn(40, 200).bfloat16(), torch.randn(200, 72).bfloat16()
    before, ours = a @ b, products(case)
    for _ in range(3):
        assert torch.equal(a @ b, before)
        assert all(torch.equal(x, y) for x, y in zip(products(case), ours, strict=True))


def test_offsets_beyond_the_rows_are_an_error() -> None:
    case = case_of((3, 2), 32, 32, torch.bfloat16)
    with pytest.raises(IndexError, match="the experts have 9 rows, but there are 5"):
        native.grouped(case.x_RD, case.weight_END, torch.tensor([3, 9]))
