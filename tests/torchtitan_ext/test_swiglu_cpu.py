"""SwiGLU on a CPU: the C kernel for bfloat16, and PyTorch's operations."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan_ext.ops import native
from torchtitan_ext.ops.swiglu import swiglu


@pytest.mark.parametrize("shape", [(5, 2), (7, 46), (3, 4, 128), (0, 8), (6,)])
@pytest.mark.parametrize("kernels", [True, False])
def test_bfloat16_equals_float64(shape: tuple[int, ...], kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel, value and gradient are rounded once (2^-8); PyTorch's operations round in between too (3 x 2^-8)."""
    if not kernels:
        monkeypatch.setattr(native, "supports", lambda *_: False)
    elif native.library() is None:
        pytest.skip("no C kernels here")
    source = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=source) * 6).bfloat16().requires_grad_()
    z = swiglu(x)
    probe = torch.randn(z.shape, generator=source).bfloat16()
    (gradient,) = torch.autograd.grad(z, x, probe)
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    wanted = F.silu(gate) * up
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, probe.double())
    bound = 2**-8 if kernels else 3 * 2**-8
    torch.testing.assert_close(z.double(), wanted.detach(), rtol=bound, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=bound, atol=1e-2 if not kernels else 1e-5)


def test_kernel_at_the_ends_of_the_range() -> None:
    if native.library() is None:
        pytest.skip("no C kernels here")
    gates = torch.tensor([-1e38, -200.0, -87.5, -1e-38, 0.0, 1e-38, 88.5, 200.0, 1e38, float("nan")])
    gate_up = torch.stack([gates, torch.ones_like(gates)], dim=1).bfloat16()
    values = native.swiglu(gate_up).float().flatten()
    torch.testing.assert_close(values, F.silu(gate_up[:, 0].float()), rtol=2**-8, atol=1e-35, equal_nan=True)
    slopes = native.swiglu_backward(gate_up, torch.ones(len(gates), 1, dtype=torch.bfloat16)).float()
    assert slopes[:-1].isfinite().all()
    assert slopes[-1].isnan().any()
