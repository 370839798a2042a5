"""The grouped product on a GPU: experts without rows on GPUs that leave their gradient unwritten."""

import pytest
import torch
from torch import Tensor

from titan_moe.model import grouped_gpu

OFFSETS = [0, 5, 5, 9, 9]


class _Unwritten(torch.autograd.Function):
    """A grouped product whose gradient for an expert without rows is NaN, as memory may hold."""

    @staticmethod
    def forward(ctx, x, weight_EDN, offsets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight_EDN, offsets)
        ends = offsets.tolist()
        parts = zip([0, *ends], ends, weight_EDN, strict=False)
        return torch.cat([x[start:end] @ weight for start, end, weight in parts])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight_EDN, offsets = ctx.saved_tensors
        grad_weight, grad_x, ends = torch.full_like(weight_EDN, float("nan")), torch.empty_like(x), offsets.tolist()
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                grad_weight[e] = x[start:end].t() @ grad[start:end]
                grad_x[start:end] = grad[start:end] @ weight_EDN[e].t()
        return grad_x, grad_weight, None


def gradient(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Tensor:
    """Of the weights, on a GPU of this capability whose product leaves gradients unwritten."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    monkeypatch.setattr(grouped_gpu.F, "grouped_mm", lambda x, weight, *, offs: _Unwritten.apply(x, weight, offs))
    grouped_gpu._major.cache_clear()
    source = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64, generator=source)
    weight = torch.randn(5, 3, 4, dtype=torch.float64, generator=source).requires_grad_()
    out = grouped_gpu.grouped_mm(x, weight, torch.tensor(OFFSETS, dtype=torch.int32))
    (found,) = torch.autograd.grad(out.sum(), weight)
    grouped_gpu._major.cache_clear()
    for e, (start, end) in enumerate(zip([0, *OFFSETS], OFFSETS, strict=False)):
        if end > start:
            torch.testing.assert_close(found[e], x[start:end].sum(0).expand(3, 4))
    return found[[0, 2, 4]]


@pytest.mark.parametrize("capability", [(10, 0), (10, 3)])
def test_blackwell_gradients_of_experts_without_rows_are_zero(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (gradient(monkeypatch, capability) == 0).all()


@pytest.mark.parametrize("capability", [(9, 0), (12, 0)])
def test_other_gpus_do_not_pay_for_it(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert gradient(monkeypatch, capability).isnan().all()
