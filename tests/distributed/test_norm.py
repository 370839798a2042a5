"""The norm of all gradients and clipping, by PyTorch's operations on lists and by the optimizer's kernel."""

import pytest
import torch
from torch import Tensor, nn

from titan_moe.config.tables import Optimizer
from titan_moe.optim.adamw import adamw
from titan_moe.parallel import norm
from titan_moe.parallel.norm import clip_gradients, scales_gradients

SHAPES = [(3, 5), (7,), (0, 4), (2, 3, 4)]


def parameters(dtype: torch.dtype, scale: float = 1.0) -> list[nn.Parameter]:
    source, found = torch.Generator().manual_seed(1), []
    for shape in SHAPES:
        found.append(nn.Parameter(torch.randn(shape, generator=source).to(dtype)))
        found[-1].grad = scale * torch.randn(shape, generator=source).to(dtype)
    found.append(nn.Parameter(torch.ones(2, dtype=dtype)))  # without a gradient
    return found


def gradients(found: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in found if p.grad is not None]


@pytest.mark.parametrize("max_norm", [1.0, 1e3])
def test_norm_and_clipped_gradients(max_norm: float) -> None:
    """Against one norm of all numbers and torch's clip_grad_norm_, in float64; a shard without elements has norm 0."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    total, norms = clip_gradients(ours, max_norm)
    wanted = [0.0 if p.grad is None else float(p.grad.norm()) for p in theirs]
    torch.testing.assert_close(norms, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(total, torch.nn.utils.clip_grad_norm_(theirs, max_norm), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-12, atol=0)


def test_copies_are_clipped_and_not_counted() -> None:
    ours = parameters(torch.float64)
    before = gradients(ours)
    total, norms = clip_gradients(ours, 1.0, copies=ours[:1])
    assert norms[0] == 0
    wanted = torch.cat([x.flatten() for x in before[1:]]).norm()
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[0].grad, before[0] / (wanted + 1e-6), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("scale", "exact"), [(1.0, False), (1e-3, True)], ids=["clipped", "below the limit"])
def test_the_optimizers_kernel_can_clip(scale: float, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused AdamW with `grad_scale`, as on a GPU, makes the update of clipped gradients: bitwise where nothing is clipped.

    Otherwise g / (1 / f) has two roundings more than g f, of 6e-8 each; Adam's update of size lr moves by as much."""
    results = []
    for in_kernel in (False, True):
        monkeypatch.setattr(norm, "scales_gradients", lambda _, in_kernel=in_kernel: in_kernel)
        ours = parameters(torch.float32, scale)
        optimizer = adamw(ours, Optimizer(lr=0.1))
        for _ in range(2):
            clip_gradients(ours, 1.0, optimizer=optimizer)
            optimizer.step()
        results.append(ours)
    for scaled, wanted in zip(results[1], results[0], strict=True):
        if exact:
            assert torch.equal(scaled, wanted)
        torch.testing.assert_close(scaled, wanted, rtol=0, atol=0.1 * 2 * 2e-6)


def test_a_cpu_keeps_multiplying() -> None:
    assert not scales_gradients(adamw(parameters(torch.float32), Optimizer()))
    assert not scales_gradients(torch.optim.SGD(parameters(torch.float32)))
