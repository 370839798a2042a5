"""Sums of each token's rows with and without gate weights, compared with PyTorch's operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.interpreter import DEVICE
from titan_moe.model.moe import Dispatcher, Routed, gather_tokens, plan_dispatch, sum_rows
from titan_moe.parallel.experts import _ApplyGates
from torchtitan_ext.ops import select

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    if wanted.numel():
        assert (found.double() - wanted.double()).abs().max() <= tolerance * wanted.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "k", "dim"), [(5, 1, 8), (6, 4, 300), (4, 6, 33), (0, 2, 8)])
def test_dispatch_and_combine_equal_float64(tokens: int, k: int, dim: int, dtype: torch.dtype) -> None:
    """x to rows, rows times gates to tokens, with gradients; expert 0 has no token."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, dim, generator=source).to(dtype).to(DEVICE)
    ids = (1 + torch.rand(tokens, 7, generator=source).argsort(1)[:, :k]).to(DEVICE)
    gates = torch.rand(tokens, k, generator=source).to(DEVICE)
    probe = torch.randn(tokens, dim, generator=source).to(dtype).to(DEVICE)
    plan = plan_dispatch(ids, 8)
    factors = torch.randn(tokens * k, dim, generator=source).to(dtype).to(DEVICE)
    results = []
    for wide in (False, True):
        leaves = [t.double() if wide else t for t in (x, gates)]
        h, g = (t.clone().requires_grad_() for t in leaves)
        assert select.fused(h) != wide
        rows = gather_tokens(h, plan)
        y = rows * factors
        y.retain_grad()
        out = Dispatcher().combine(y, Routed(rows, plan.offsets_E, g, plan))
        out.backward(probe.to(out.dtype))
        results.append((out, y.grad, g.grad, h.grad))
    assert results[0][0].dtype == dtype
    assert results[0][2].dtype == torch.float32
    for number, (found, wanted) in enumerate(zip(*results, strict=True)):
        # The gradient of x has gone through y's, which is rounded to dtype, and y itself is.
        close(found, wanted, TOLERANCE[dtype] * (1, 1, 2, 4)[number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_rows_equal_pytorch(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(1)
    y = torch.randn(12, 20, generator=source).to(dtype).to(DEVICE)
    plan = plan_dispatch(torch.randint(3, (4, 3), generator=source).to(DEVICE), 3)
    wanted = F.embedding_bag(plan.rows_TK, y.double(), mode="sum")
    close(sum_rows(y, plan), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_at_the_experts_of_other_ranks(dtype: torch.dtype) -> None:
    """Rows times their gate weights, as expert parallelism applies them, with both gradients."""
    source = torch.Generator().manual_seed(2)
    y, probe = (torch.randn(11, 20, generator=source).to(dtype).to(DEVICE) for _ in range(2))
    gates = torch.rand(11, generator=source).to(DEVICE)
    results = []
    for wide in (False, True):
        leaves = [(t.double() if wide else t).clone().requires_grad_() for t in (y, gates)]
        out = _ApplyGates.apply(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, probe.to(out.dtype))))
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, 2 * TOLERANCE[dtype])
    assert results[0][2].dtype == torch.float32
