"""Small routings for tests of single losses, and the comparison with a definition written as loops."""

from collections.abc import Callable

import torch
from torch import Tensor

KS = [1, 2, 4, 8]


EXPERTS, TOKENS, WIDTH, LAYERS = 10, 6, 5, 3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def routing(
    k: int, seed: int = 0, layers: int = 1, score: str = "softmax"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, normalised scores and chosen experts; the last expert gets no token."""
    logits = torch.randn(layers, TOKENS, EXPERTS, dtype=torch.float64, generator=generator(seed))
    logits[..., -1] = -30.0
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    ids = scores.topk(k, dim=-1).indices
    assert not bool((ids == EXPERTS - 1).any())
    return list(logits), [s.requires_grad_() for s in scores], list(ids)


def assert_same(ours: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Value and gradient. Sums of a few hundred float64 terms of order 1 agree to about 1e-13."""
    value, wanted = ours(*inputs), definition(*inputs)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-13)
    if not wanted.requires_grad:
        return
    for a, b in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
