"""The router's product by three bfloat16 parts: exact parts, the error bound of the docstring, and its use."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.interpreter import DEVICE
from titan_moe.config.tables import MoE
from titan_moe.model import router_product
from titan_moe.model.moe import Router
from titan_moe.model.router_product import parts_of
from torchtitan_ext.ops import select

U = 2.0**-24


def test_three_parts_are_the_number() -> None:
    source = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 120, (5000,), generator=source)
    x = torch.randn(5000, generator=source) * 2.0**exponents
    assert torch.equal(sum(part.double() for part in parts_of(x)), x.double())
    two = sum(part.double() for part in parts_of(x, 2))
    assert ((two - x).abs() <= 2.0**-16 * x.abs()).all()


@pytest.mark.parametrize("width", [16, 512])
def test_logits_and_gradients_are_those_of_a_float32_product(width: int) -> None:
    """Within the bound, and no further from float64 than twice what a float32 product is."""
    source = torch.Generator().manual_seed(width)
    x = torch.randn(64, width, generator=source).bfloat16().to(DEVICE)
    weight = torch.randn(12, width, generator=source).to(DEVICE) * torch.logspace(-3, 3, 12).unsqueeze(1).to(DEVICE)
    probe = torch.randn(64, 12, generator=source).to(DEVICE)

    def results(product, dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        out = product(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, probe.to(out.dtype))]

    exact = results(F.linear, torch.float64)
    plain = [t.double() for t in results(F.linear, torch.float32)]
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = router_product.router_product(*leaves)
    found = [out.detach(), *torch.autograd.grad(out, leaves, probe)]
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32]
    sizes = x.double().abs() @ weight.double().abs().t()
    assert ((found[0] - exact[0]).abs() <= 1.01 * (width + 2) * U * sizes).all()
    sizes = probe.double().abs().t() @ x.double().abs()
    assert ((found[2] - exact[2]).abs() <= 1.01 * (64 + 2) * U * sizes).all()
    for number in (0, 2):
        assert (found[number] - exact[number]).norm() <= 2 * (plain[number] - exact[number]).norm()
    sizes = probe.double().abs() @ weight.double().abs()  # one rounding of the result, and what the two parts leave out
    assert ((found[1] - exact[1]).abs() <= 2.0**-8 * exact[1].abs() + 2.0**-14 * sizes).all()


def test_it_is_used_for_bfloat16_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    router, used = Router(8, MoE(experts=4, top_k=2)), []
    torch.nn.init.normal_(router.weight)
    router.to(DEVICE)
    monkeypatch.setattr(
        "titan_moe.model.moe.router_product", lambda x, w: used.append(x.dtype) or F.linear(x.float(), w)
    )
    for dtype in (torch.bfloat16, torch.float32):
        router(torch.randn(3, 8, device=DEVICE).to(dtype))
    monkeypatch.setattr(select, "TRITON_DEVICES", ())
    router(torch.randn(3, 8, device=DEVICE).bfloat16())
    assert used == [torch.bfloat16]
