"""Every loss against the definition written as plain loops, values and gradients, in float64."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.helpers import reference
from torchtitan_ext.losses import (
    coupling_loss,
    expert_router_coupling_loss,
    load_balance_loss,
    orthogonality_loss,
    router_z_loss,
    routing_variance_loss,
    specialization_loss,
)
from torchtitan_ext.metrics import token_entropy
from torchtitan_ext.ops.response import coupling_noise, coupling_noise_bound
from torchtitan_ext.ops.routing import largest_ids

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


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_load_balance(k: int, score: str) -> None:
    _, (scores,), (ids,) = routing(k, score=score)
    assert_same(lambda s: load_balance_loss(s, ids), lambda s: reference.load_balance(s, ids), scores)


def test_load_balance_normalises_sigmoids() -> None:
    raw = torch.rand(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(1)).requires_grad_()
    ids = raw.topk(2).indices
    assert_same(lambda s: load_balance_loss(s, ids), lambda s: reference.load_balance(s, ids), raw)


def test_load_balance_is_one_when_balanced() -> None:
    scores = torch.full((8, 4), 0.25, dtype=torch.float64)
    ids = torch.tensor([[i % 4, (i + 1) % 4] for i in range(8)])
    assert load_balance_loss(scores, ids).item() == pytest.approx(1.0, abs=1e-15)


def test_load_balance_per_sequence_is_the_mean_over_sequences() -> None:
    _, scores, ids = routing(2, layers=3)
    stacked = torch.stack(scores)
    value = load_balance_loss(stacked, torch.stack(ids))
    wanted = sum(reference.load_balance(s, i) for s, i in zip(scores, ids, strict=True)) / 3
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)


def test_load_from_elsewhere_replaces_the_shares() -> None:
    _, (scores,), (ids,) = routing(2)
    load = torch.rand(EXPERTS, dtype=torch.float64, generator=generator(3))
    wanted = EXPERTS * (load * scores.mean(0)).sum()
    torch.testing.assert_close(load_balance_loss(scores, ids, load), wanted, rtol=1e-12, atol=0)


def test_router_z() -> None:
    (logits,), _, _ = routing(2)
    assert_same(router_z_loss, reference.z_loss, logits.requires_grad_())


@pytest.mark.parametrize("k", KS)
def test_specialization(k: int) -> None:
    z = torch.randn(TOKENS, k, WIDTH, dtype=torch.float64, generator=generator(k)).requires_grad_()
    assert_same(specialization_loss, reference.specialization, z)
    assert 0.0 <= specialization_loss(z).item() <= k * (k - 1)


@pytest.mark.parametrize("k", KS)
def test_specialization_above_chance(k: int) -> None:
    """Some pairs lie below 1/F and some above, and those below have no gradient."""
    z = torch.randn(TOKENS, k, WIDTH, dtype=torch.float64, generator=generator(1)).requires_grad_()
    assert_same(
        lambda z: specialization_loss(z, above_chance=True), lambda z: reference.specialization(z, 1 / WIDTH), z
    )
    if k == 2:
        per_token = [specialization_loss(z[i : i + 1], above_chance=True).item() for i in range(TOKENS)]
        assert 0 < per_token.count(0.0) < TOKENS


def test_specialization_of_equal_and_of_orthogonal_experts() -> None:
    z = torch.ones(3, 4, WIDTH, dtype=torch.float64)
    assert specialization_loss(z).item() == pytest.approx(12.0, rel=1e-14)
    assert specialization_loss(torch.eye(4, dtype=torch.float64).expand(3, 4, 4)).item() == 0.0


def test_a_zero_activation_has_cosine_and_gradient_zero() -> None:
    z = torch.randn(TOKENS, 4, WIDTH, dtype=torch.float64, generator=generator(5))
    z[1, 2] = 0.0
    z[4] = 0.0
    z.requires_grad_()
    assert_same(specialization_loss, reference.specialization, z)
    (grad,) = torch.autograd.grad(specialization_loss(z), z)
    assert not grad[1, 2].any()
    assert not grad[4].any()


def test_specialization_on_rows_in_any_order() -> None:
    z = torch.randn(TOKENS, 3, WIDTH, dtype=torch.float64, generator=generator(6))
    order = torch.randperm(TOKENS * 3, generator=generator(7))
    shuffled = torch.empty(TOKENS * 3, WIDTH, dtype=torch.float64)
    shuffled[order] = z.reshape(-1, WIDTH)
    rows = order.reshape(TOKENS, 3)
    torch.testing.assert_close(specialization_loss(shuffled, rows=rows), specialization_loss(z), rtol=1e-14, atol=0)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("source", ["all", "activated"])
def test_coupling_is_the_triple_sum(k: int, source: str) -> None:
    _, scores, ids = routing(k, layers=LAYERS)
    value = coupling_loss(scores, k, source, ids)
    wanted = reference.coupling(scores, k, source, ids)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-14)
    for a, b in zip(torch.autograd.grad(value, scores), torch.autograd.grad(wanted, scores), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("source", ["all", "activated"])
def test_coupling_of_unnormalised_scores_and_of_ties(source: str) -> None:
    scores = [torch.rand(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(s)) for s in range(3)]
    scores[1][2] = 0.5  # all equal: any top-k has the same mass
    ids = [s.topk(3).indices for s in scores]
    value = coupling_loss(scores, 3, source, ids)
    torch.testing.assert_close(value, reference.coupling(scores, 3, source, ids), rtol=1e-12, atol=0)


@pytest.mark.parametrize("source", ["all", "activated"])
def test_coupling_by_logarithms(source: str) -> None:
    """Minus the mean over tokens of the logarithm of what the triple sum is for that token alone."""
    _, scores, ids = routing(3, layers=2)

    def definition(*scores: Tensor) -> Tensor:
        parts = [
            reference.coupling([s[i : i + 1] for s in scores], 3, source, [x[i : i + 1] for x in ids])
            for i in range(TOKENS)
        ]
        return sum(-torch.log(-part) for part in parts) / TOKENS

    assert_same(lambda *s: coupling_loss(s, 3, source, ids, form="log"), definition, *scores)


def test_the_logarithm_does_not_fade_with_the_number_of_experts() -> None:
    """Near uniform routing the gradient of cp's mass with respect to a logit falls as 1/E, that of its logarithm does not."""
    norms = {}
    for form in ("mass", "log"):
        for experts in (16, 256):
            logits = (1e-3 * torch.randn(1, experts, dtype=torch.float64, generator=generator(0))).requires_grad_()
            uniform = torch.full((1, experts), 1 / experts, dtype=torch.float64)
            coupling_loss([uniform, logits.softmax(-1)], 2, form=form).backward()
            norms[form, experts] = logits.grad.abs().max().item()
    assert norms["mass", 256] / norms["mass", 16] == pytest.approx(1 / 16, rel=0.2)
    assert norms["log", 256] / norms["log", 16] == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("source", ["all", "activated"])
def test_coupling_bound_of_proposition_c7(source: str) -> None:
    """-(L-1) bounds it from below, and balanced one-hot-like routing, shifted from token to token, reaches it."""
    _, scores, ids = routing(2, layers=LAYERS)
    assert coupling_loss(scores, 2, source, ids).item() > -(LAYERS - 1)
    k, tokens = 2, EXPERTS
    best = torch.zeros(tokens, EXPERTS, dtype=torch.float64)
    chosen = torch.tensor([[i % EXPERTS, (i + 3) % EXPERTS] for i in range(tokens)])
    best.scatter_(1, chosen, torch.tensor([0.7, 0.3], dtype=torch.float64).expand(tokens, k))
    reached = coupling_loss([best] * LAYERS, k, source, [chosen] * LAYERS)
    assert reached.item() == pytest.approx(-(LAYERS - 1), abs=1e-14)
    # Every expert gets the same number of tokens; lb of such a state is 1.
    assert load_balance_loss(best, chosen).item() == pytest.approx(1.0, abs=1e-14)


def test_coupling_by_transitions() -> None:
    """Against loops over the transition matrix; a planted path (each expert followed by the next) is found."""
    _, scores, _ = routing(3, layers=LAYERS)
    wanted = reference.zero(scores[0])
    for earlier, later in pairwise(scores):
        for e in range(EXPERTS):
            row = [sum(earlier[i, e] * later[i, v] for i in range(TOKENS)) / TOKENS for v in range(EXPERTS)]
            wanted = wanted - sum(sorted(row, key=lambda c: -c.item())[:3])
    value = coupling_loss(scores, 3, "transition")
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(value, scores), torch.autograd.grad(wanted, scores), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    path = torch.eye(EXPERTS, dtype=torch.float64)
    assert coupling_loss([path, path.roll(1, 1)], 1, "transition").item() == pytest.approx(-1.0, abs=1e-14)
    mixed = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    assert coupling_loss([path, mixed], 1, "transition").item() == pytest.approx(-1 / EXPERTS, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("experts", "count"), [(1, 1), (5, 2), (16, 2), (64, 6), (7, 7), (300, 40)])
def test_the_largest_scores(dtype: torch.dtype, experts: int, count: int) -> None:
    """As topk finds them; equal ones in the order of their places; strided input; NaN first."""
    scores = torch.rand(40, 2 * experts, dtype=dtype, generator=generator(8))[:, ::2]
    found = largest_ids(scores, count)
    assert torch.equal(found, scores.topk(count, dim=-1).indices)
    coarse = (scores * 4).floor()
    order = coarse.argsort(dim=-1, descending=True, stable=True)[:, :count]
    assert torch.equal(largest_ids(coarse, count), order)
    assert largest_ids(scores[:0], count).shape == (0, count)
    broken = scores.clone()
    broken[3, experts // 2] = torch.nan
    assert largest_ids(broken, count)[3, 0] == experts // 2
    half = scores.bfloat16()
    assert torch.equal(half.gather(1, largest_ids(half, count)), half.topk(count, dim=-1).values)
    with pytest.raises((ValueError, RuntimeError)):
        largest_ids(scores, experts + 1)


def test_coupling_of_one_layer_is_a_connected_zero() -> None:
    _, scores, _ = routing(2)
    value = coupling_loss(scores, 2)
    assert value.item() == 0.0
    assert value.requires_grad


def test_unknown_coupling_source() -> None:
    _, scores, _ = routing(2, layers=2)
    with pytest.raises(ValueError, match="sideways"):
        coupling_loss(scores, 2, "sideways")
    with pytest.raises(ValueError, match="topk_ids"):
        coupling_loss(scores, 2, "activated")
    with pytest.raises(ValueError, match="'linear' is not one of 'mass', 'log'"):
        coupling_loss(scores, 2, form="linear")
    with pytest.raises(ValueError, match="form='log' takes each token's mass"):
        coupling_loss(scores, 2, "transition", form="log")


@pytest.mark.parametrize("delta", [0.01, 0.1, 0.3, 0.5])
def test_entropy_bound_of_corollary_c3(delta: float) -> None:
    """g of the best expert >= 1 - delta implies H <= h(delta) + delta log(E - 1); uniform leftovers reach it."""
    bound = -delta * math.log(delta) - (1 - delta) * math.log(1 - delta) + delta * math.log(EXPERTS - 1)
    rest = torch.rand(50, EXPERTS - 1, dtype=torch.float64, generator=generator(8))
    share = delta * torch.rand(50, 1, dtype=torch.float64, generator=generator(9))
    gates = torch.cat([1 - share, rest / rest.sum(1, keepdim=True) * share], dim=1)
    assert bool((token_entropy(gates) <= bound + 1e-12).all())
    extreme = torch.full((1, EXPERTS), delta / (EXPERTS - 1), dtype=torch.float64)
    extreme[0, 0] = 1 - delta
    assert token_entropy(extreme).item() == pytest.approx(bound, rel=1e-12)


def test_gradient_cosines_of_proposition_4_1() -> None:
    """Per token, gradients of two experts' down projections have the cosine of their activations (up to gate signs)."""
    k, width, dim = 3, 7, 4
    x = torch.randn(k, width, dtype=torch.float64, generator=generator(10))
    down = [
        torch.randn(dim, width, dtype=torch.float64, generator=generator(20 + e)).requires_grad_() for e in range(k)
    ]
    gates = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    loss = torch.tanh(sum(gates[e] * down[e] @ x[e] for e in range(k))).pow(3).sum()
    grads = [g.flatten() for g in torch.autograd.grad(loss, down)]
    for e in range(k):
        for v in range(k):
            ours = torch.cosine_similarity(grads[e], grads[v], dim=0)
            torch.testing.assert_close(ours, torch.cosine_similarity(x[e], x[v], dim=0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("k", KS)
def test_orthogonality(k: int) -> None:
    y = torch.randn(TOKENS, k, WIDTH + 4, dtype=torch.float64, generator=generator(k)).requires_grad_()
    assert_same(orthogonality_loss, reference.orthogonality, y)
    assert_same(lambda y: orthogonality_loss(y, "code"), reference.orthogonality_code, y)


def test_orthogonality_of_dependent_and_of_zero_outputs() -> None:
    """More experts than dimensions: the others span everything (value only: the definition has a kink there)."""
    y = torch.randn(TOKENS, 4, 3, dtype=torch.float64, generator=generator(5))
    whole = y.square().sum(2).mean()
    torch.testing.assert_close(orthogonality_loss(y, "code"), whole, rtol=1e-9, atol=0)
    y[2, 1] = 0.0
    y[3] = 0.0
    for variant, definition in (("paper", reference.orthogonality), ("code", reference.orthogonality_code)):
        torch.testing.assert_close(orthogonality_loss(y, variant), definition(y), rtol=1e-9, atol=1e-12)
    grad = torch.func.grad(orthogonality_loss)(y)
    assert bool(torch.isfinite(grad).all())
    assert not grad[3].any()


@pytest.mark.parametrize(
    ("variant", "definition"), [("paper", reference.routing_variance), ("code", reference.routing_variance_code)]
)
def test_routing_variance(variant: str, definition: Callable[[Tensor], Tensor]) -> None:
    _, (scores,), (ids,) = routing(3)
    gates = torch.zeros_like(scores).scatter(1, ids, scores.detach().gather(1, ids))
    gates = (gates / gates.sum(1, keepdim=True)).requires_grad_()
    assert_same(lambda g: routing_variance_loss(g, variant), definition, gates)


def test_routing_variance_gradient_and_mean_from_elsewhere() -> None:
    gates = torch.rand(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(3)).requires_grad_()
    (grad,) = torch.autograd.grad(routing_variance_loss(gates), gates)
    wanted = -(2 / EXPERTS) * (gates - gates.mean(0)) / TOKENS
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-15)
    # Two halves with the mean of the whole add up to the whole.
    weights = torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64)
    halves = [
        routing_variance_loss(g, mean=gates.mean(0), weights=w)
        for g, w in zip(gates.chunk(2), weights.chunk(2), strict=True)
    ]
    torch.testing.assert_close(sum(halves), routing_variance_loss(gates), rtol=1e-13, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("experts", [2, 5])
def test_expert_router_coupling(alpha: float, experts: int) -> None:
    router = torch.randn(experts, 6, dtype=torch.float64, generator=generator(1)).requires_grad_()
    gate = torch.randn(experts, 4, 6, dtype=torch.float64, generator=generator(2)).requires_grad_()
    delta = 0.8 + 0.4 * torch.rand(experts, 6, dtype=torch.float64, generator=generator(3))
    assert_same(
        lambda r, g: expert_router_coupling_loss(r, g, alpha, delta),
        lambda r, g: reference.expert_router_coupling(r, g, alpha, delta),
        router,
        gate,
    )
    detached = expert_router_coupling_loss(router, gate, alpha, delta, detach_router=True)
    assert torch.autograd.grad(detached, router, allow_unused=True) == (None,)


def test_coupling_noise_stays_inside_its_bound() -> None:
    router = torch.randn(5, 6, dtype=torch.float64, generator=generator(1))
    bound = coupling_noise_bound(router)
    torch.testing.assert_close(
        bound, torch.tensor(reference.noise_bound(router), dtype=torch.float64), rtol=1e-12, atol=0
    )
    low = coupling_noise(router, torch.zeros(5, 6, dtype=torch.float64))
    torch.testing.assert_close(low, (1 - bound).unsqueeze(1).expand(5, 6), rtol=1e-12, atol=0)
    drawn = [expert_router_coupling_loss(router, torch.ones(5, 2, 6, dtype=torch.float64)) for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_wrong_use_of_o_v_and_erc() -> None:
    with pytest.raises(ValueError, match="sideways"):
        orthogonality_loss(torch.ones(1, 2, 3), "sideways")
    with pytest.raises(ValueError, match="sideways"):
        routing_variance_loss(torch.ones(1, 2), "sideways")
    with pytest.raises(ValueError, match="two experts"):
        expert_router_coupling_loss(torch.ones(1, 2), torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="negative"):
        expert_router_coupling_loss(torch.ones(2, 2), torch.ones(2, 3, 2), alpha=-1.0)


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
def test_no_token_gives_a_connected_zero_and_one_token_works(tokens: int) -> None:
    logits = [torch.randn(tokens, EXPERTS, generator=generator(s)).requires_grad_() for s in range(2)]
    z = torch.randn(tokens, 2, WIDTH, generator=generator(3)).requires_grad_()
    values = all_losses(logits, z, 2)
    values.sum().backward()
    assert z.grad is not None
    assert all(q.grad is not None and bool(torch.isfinite(q.grad).all()) for q in logits)
    assert (values == 0).all() if tokens == 0 else bool(torch.isfinite(values).all())


def test_weights_select_tokens() -> None:
    """Weights 1/n on n tokens and 0 on the others give the value of those tokens alone."""
    logits = [torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(s)) for s in range(3)]
    z = torch.randn(TOKENS, 2, WIDTH, dtype=torch.float64, generator=generator(3))
    keep = torch.tensor([True, False, True, True, False, True])
    weighted = all_losses(logits, z, 2, keep.double() / keep.sum())
    alone = all_losses([q[keep] for q in logits], z[keep], 2)
    torch.testing.assert_close(weighted, alone, rtol=1e-13, atol=1e-14)


LOSSES = ["lb", "z", "sp", "cp", "cp:activated", "cp:transition", "o", "o:code", "v", "v:code", "erc"]


def single_loss(name: str, k: int, ids: list[Tensor], s: list[Tensor], z: Tensor, erc: tuple[Tensor, ...]) -> Tensor:
    """One loss or variant of scores s, activations z, and erc's router, gate weights and noise."""
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
def test_bfloat16_and_strided_input(name: str) -> None:
    """bfloat16 rounds the inputs and nothing else: values are those of the rounded inputs in float32, gradients are rounded
    once (2^-9 relative; twice that is allowed, and float32 noise of the largest)."""
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
def test_every_expert_chosen(experts: int) -> None:
    """E = k: nothing is left out, so masses are 1, the load is even, and the definitions still hold."""
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


def test_under_torch_func() -> None:
    logits = [torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(s)) for s in range(3)]
    z = torch.randn(TOKENS, 2, WIDTH, dtype=torch.float64, generator=generator(3))
    by_func = torch.func.grad(lambda z: all_losses(logits, z, 2).sum())(z)
    (by_autograd,) = torch.autograd.grad(all_losses(logits, z.requires_grad_(), 2).sum(), z)
    torch.testing.assert_close(by_func, by_autograd, rtol=1e-13, atol=1e-15)
    many = torch.stack([z.detach(), 2 * z.detach() + 1])
    mapped = torch.func.vmap(specialization_loss)(many)
    torch.testing.assert_close(mapped, torch.stack([specialization_loss(m) for m in many]), rtol=1e-13, atol=0)


@pytest.mark.slow
def test_under_torch_compile() -> None:
    """The compiler reorders float64 sums of order 1: 1e-12 is far above that."""
    logits = [torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(s)) for s in range(3)]
    z = torch.randn(TOKENS, 2, WIDTH, dtype=torch.float64, generator=generator(3))
    inputs = [tensor.requires_grad_() for tensor in (*logits, z)]
    weights = torch.tensor([0.3, 0.0, 0.2, 0.4, 0.0, 0.1], dtype=torch.float64)
    compiled = torch.compile(all_losses, fullgraph=True)(logits, z, 2, weights)
    eager = all_losses(logits, z, 2, weights)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-13)
    for a, b in zip(torch.autograd.grad(compiled.sum(), inputs), torch.autograd.grad(eager.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
