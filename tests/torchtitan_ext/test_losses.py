"""Properties of all losses: no token, token weights, bfloat16, strided input, E = k, torch.func and torch.compile."""

import pytest
import torch
from torch import Tensor

from tests.helpers import reference
from tests.helpers.losses import EXPERTS, LAYERS, TOKENS, WIDTH, assert_same, generator
from torchtitan_ext.losses import (
    coupling_loss,
    expert_router_coupling_loss,
    load_balance_loss,
    orthogonality_loss,
    router_z_loss,
    routing_variance_loss,
    specialization_loss,
)


def all_losses(logits: list[Tensor], z: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    scores = [q.softmax(-1) for q in logits]
    ids = [s.topk(k).indices for s in scores]
    return torch.stack(
        [
            load_balance_loss(scores[0], ids[0], weights=weights),
            router_z_loss(logits[0], weights=weights),
            specialization_loss(z, weights=weights),
            coupling_loss(scores, k, weights=weights),
            coupling_loss(scores, k, "activated", ids, weights=weights),
            orthogonality_loss(z, weights=weights),
            orthogonality_loss(z, "code", weights=weights),
            routing_variance_loss(scores[0], weights=weights),
            routing_variance_loss(scores[0], "code", weights=weights),
        ]
    )


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_gives_a_differentiable_zero_and_one_token_finite_gradients(tokens: int) -> None:
    logits = [torch.randn(tokens, EXPERTS, generator=generator(s)).requires_grad_() for s in range(2)]
    z = torch.randn(tokens, 2, WIDTH, generator=generator(3)).requires_grad_()
    values = all_losses(logits, z, 2)
    values.sum().backward()
    assert z.grad is not None
    assert all(q.grad is not None and bool(torch.isfinite(q.grad).all()) for q in logits)
    assert (values == 0).all() if tokens == 0 else bool(torch.isfinite(values).all())


def test_tokens_of_weight_0_do_not_count() -> None:
    """Weights 1/n for n tokens and 0 for the others give the value of the n tokens."""
    logits = [torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(s)) for s in range(3)]
    z = torch.randn(TOKENS, 2, WIDTH, dtype=torch.float64, generator=generator(3))
    keep = torch.tensor([True, False, True, True, False, True])
    weighted = all_losses(logits, z, 2, keep.double() / keep.sum())
    selected = all_losses([q[keep] for q in logits], z[keep], 2)
    torch.testing.assert_close(weighted, selected, rtol=1e-13, atol=1e-14)


LOSSES = ["lb", "z", "sp", "cp", "cp:activated", "cp:transition", "o", "o:code", "v", "v:code", "erc"]


def single_loss(name: str, k: int, ids: list[Tensor], s: list[Tensor], z: Tensor, erc: tuple[Tensor, ...]) -> Tensor:
    """One loss or variant from scores s, activations z, and erc's router weight, gate weight and noise."""
    name, _, variant = name.partition(":")
    if name == "lb":
        return load_balance_loss(s[0], ids[0])
    if name == "z":
        return router_z_loss(s[0])
    if name == "sp":
        return specialization_loss(z)
    if name == "cp":
        return coupling_loss(s, k, variant or "all", ids)
    if name == "o":
        return orthogonality_loss(z, variant or "paper")
    if name == "v":
        return routing_variance_loss(s[0], variant or "paper")
    return expert_router_coupling_loss(erc[0], erc[1], 0.9, erc[2])


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_and_strided_inputs_are_computed_in_float32(name: str) -> None:
    """Values are those of the rounded inputs in float32. Gradients are rounded once (2^-9 relative; 2^-8 is allowed,
    plus float32 rounding of the largest)."""
    k = 2
    strided = [torch.rand(TOKENS, 2 * EXPERTS, generator=generator(s)).softmax(-1).bfloat16()[:, ::2] for s in range(2)]
    z = torch.randn(TOKENS, WIDTH, k, generator=generator(3)).bfloat16().transpose(1, 2)
    router = torch.randn(WIDTH, EXPERTS, generator=generator(4)).bfloat16().t()
    gate = torch.randn(EXPERTS, WIDTH, 3, generator=generator(5)).bfloat16().transpose(1, 2)
    ids = [s.topk(k).indices for s in strided]
    noise = 1 + 0.1 * torch.randn(EXPERTS, WIDTH, generator=generator(6))

    def results(inputs: list[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        value = single_loss(name, k, ids, leaves[:2], leaves[2], (leaves[3], leaves[4], noise))
        return value, torch.autograd.grad(value, leaves, allow_unused=True)

    inputs = [*strided, z, router, gate]
    assert not any(x.is_contiguous() for x in inputs)
    value, gradients = results(inputs)
    wanted, exact = results([x.float().contiguous() for x in inputs])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert any(g is not None for g in exact)
    for a, b in zip(gradients, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == torch.bfloat16
            torch.testing.assert_close(a.float(), b, rtol=2**-8, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_values_when_every_expert_is_chosen(experts: int) -> None:
    """E = k: top-k masses are 1, the load is balanced, and the losses equal their definitions."""
    logits = torch.randn(LAYERS, TOKENS, experts, dtype=torch.float64, generator=generator(0))
    scores = [s.requires_grad_() for s in logits.softmax(-1)]
    ids = [s.topk(experts).indices for s in scores]
    z = torch.randn(TOKENS, experts, WIDTH, dtype=torch.float64, generator=generator(3)).requires_grad_()
    assert load_balance_loss(scores[0], ids[0]).item() == pytest.approx(1.0, rel=1e-14)
    for source in ("all", "activated", "transition"):
        assert coupling_loss(scores, experts, source, ids).item() == pytest.approx(1.0 - LAYERS, rel=1e-14)
    assert_same(specialization_loss, reference.specialization, z)
    if experts == 1:
        assert specialization_loss(z).item() == 0.0
        assert orthogonality_loss(z).item() == 0.0
        assert orthogonality_loss(z, "code").item() == 0.0
        assert routing_variance_loss(scores[0], "code").item() == 0.0
    else:
        assert_same(orthogonality_loss, reference.orthogonality, z)
    assert_same(routing_variance_loss, reference.routing_variance, scores[0])


def test_torch_func_gives_the_same_gradients_and_values() -> None:
    logits = [torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(s)) for s in range(3)]
    z = torch.randn(TOKENS, 2, WIDTH, dtype=torch.float64, generator=generator(3))
    by_func = torch.func.grad(lambda z: all_losses(logits, z, 2).sum())(z)
    (by_autograd,) = torch.autograd.grad(all_losses(logits, z.requires_grad_(), 2).sum(), z)
    torch.testing.assert_close(by_func, by_autograd, rtol=1e-13, atol=1e-15)
    many = torch.stack([z.detach(), 2 * z.detach() + 1])
    mapped = torch.func.vmap(specialization_loss)(many)
    torch.testing.assert_close(mapped, torch.stack([specialization_loss(m) for m in many]), rtol=1e-13, atol=0)


@pytest.mark.slow
def test_torch_compile_gives_the_same_values_and_gradients() -> None:
    """The compiler reorders float64 sums of order 1, which changes them by less than 1e-12."""
    logits = [torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(s)) for s in range(3)]
    z = torch.randn(TOKENS, 2, WIDTH, dtype=torch.float64, generator=generator(3))
    inputs = [tensor.requires_grad_() for tensor in (*logits, z)]
    weights = torch.tensor([0.3, 0.0, 0.2, 0.4, 0.0, 0.1], dtype=torch.float64)
    compiled = torch.compile(all_losses, fullgraph=True)(logits, z, 2, weights)
    eager = all_losses(logits, z, 2, weights)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-13)
    for a, b in zip(torch.autograd.grad(compiled.sum(), inputs), torch.autograd.grad(eager.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
