"""o, v and erc against their definitions written as plain loops, values and gradients, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import reference
from tests.helpers.losses import EXPERTS, KS, TOKENS, WIDTH, assert_same, generator, routing
from torchtitan_ext.losses import expert_router_coupling_loss, orthogonality_loss, routing_variance_loss
from torchtitan_ext.ops.response import coupling_noise, coupling_noise_bound
from torchtitan_ext.ops.routing import labelled_counts
from torchtitan_ext.terms import LayerView, Setting, Tokens
from torchtitan_ext.terms.variance import RoutingVariance


@pytest.mark.parametrize("k", KS)
def test_orthogonality_equals_its_definition(k: int) -> None:
    y = torch.randn(TOKENS, k, WIDTH + 4, dtype=torch.float64, generator=generator(k)).requires_grad_()
    assert_same(orthogonality_loss, reference.orthogonality, y)
    assert_same(lambda y: orthogonality_loss(y, "code"), reference.orthogonality_code, y)


def test_orthogonality_of_linearly_dependent_and_of_zero_outputs() -> None:
    """With more experts than dimensions the other outputs span the space (values only: the definition is not
    differentiable there)."""
    y = torch.randn(TOKENS, 4, 3, dtype=torch.float64, generator=generator(5))
    mean_square = y.square().sum(2).mean()
    torch.testing.assert_close(orthogonality_loss(y, "code"), mean_square, rtol=1e-9, atol=0)
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
def test_routing_variance_equals_its_definition(variant: str, definition: Callable[[Tensor], Tensor]) -> None:
    _, (scores,), (ids,) = routing(3)
    gates = torch.zeros_like(scores).scatter(1, ids, scores.detach().gather(1, ids))
    gates = (gates / gates.sum(1, keepdim=True)).requires_grad_()
    assert_same(lambda g: routing_variance_loss(g, variant), definition, gates)


def test_routing_variance_gradient_and_given_mean() -> None:
    gates = torch.rand(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(3)).requires_grad_()
    (grad,) = torch.autograd.grad(routing_variance_loss(gates), gates)
    wanted = -(2 / EXPERTS) * (gates - gates.mean(0)) / TOKENS
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-15)
    # With the mean of all tokens given, two halves of the tokens add up to the value of all.
    weights = torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64)
    halves = [
        routing_variance_loss(g, mean=gates.mean(0), weights=w)
        for g, w in zip(gates.chunk(2), weights.chunk(2), strict=True)
    ]
    torch.testing.assert_close(sum(halves), routing_variance_loss(gates), rtol=1e-13, atol=0)


def one_layer(gates_TK: Tensor, ids_TK: Tensor) -> LayerView:
    """What v sees of a layer."""
    tokens, count = len(gates_TK), ids_TK.max().item() + 1
    none, weights_T = gates_TK.new_empty(0), torch.full((tokens,), 1 / tokens, dtype=gates_TK.dtype)
    scores_TE = torch.zeros(tokens, int(count), dtype=gates_TK.dtype)
    given = Tokens(weights_T.unsqueeze(0), none, none, none)
    return LayerView(
        0,
        given,
        scores_TE,
        scores_TE,
        ids_TK,
        gates_TK,
        none,
        weights_T,
        labelled_counts(ids_TK, int(count), weights_T),
    )


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("k", [2, EXPERTS])
def test_routing_variance_from_sums_is_as_exact_as_from_deviations(k: int, spread: float) -> None:
    """Scope `global` forms v from sums over tokens. In float32, also where the gates hardly vary, value and gradient are within
    the rounding of the gates: a few units in the last place of a gate over its deviation from the mean."""
    logits = (spread * torch.randn(TOKENS, k, dtype=torch.float64, generator=generator(7))).requires_grad_()
    ids = torch.rand(TOKENS, EXPERTS, generator=generator(8)).topk(k, 1).indices
    ids[0] = torch.arange(EXPERTS - k, EXPERTS)
    term = RoutingVariance(RoutingVariance.Options(weight=1.0, scope="global"), Setting(k))
    found = {}
    for dtype in (torch.float64, torch.float32):
        value = term.at_layer(one_layer(logits.softmax(1).to(dtype), ids))
        found[dtype] = (value.detach().double(), *torch.autograd.grad(value, logits))
    gates = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, ids, logits.softmax(1))
    wanted = routing_variance_loss(gates)
    exact = (wanted.detach(), *torch.autograd.grad(wanted, logits))
    torch.testing.assert_close(found[torch.float64], exact, rtol=1e-9, atol=1e-16)
    deviation = (gates - gates.mean(0)).abs().mean().item()
    rounding = 8 * torch.finfo(torch.float32).eps * gates.max().item() / deviation
    torch.testing.assert_close(found[torch.float32][0], exact[0], rtol=rounding, atol=0)
    torch.testing.assert_close(
        found[torch.float32][1], exact[1], rtol=rounding, atol=rounding * exact[1].abs().max().item()
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("experts", [2, 5])
def test_expert_router_coupling_equals_its_definition(alpha: float, experts: int) -> None:
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


def test_expert_router_noise_stays_inside_its_bound() -> None:
    router = torch.randn(5, 6, dtype=torch.float64, generator=generator(1))
    bound = coupling_noise_bound(router)
    torch.testing.assert_close(
        bound, torch.tensor(reference.noise_bound(router), dtype=torch.float64), rtol=1e-12, atol=0
    )
    low = coupling_noise(router, torch.zeros(5, 6, dtype=torch.float64))
    torch.testing.assert_close(low, (1 - bound).unsqueeze(1).expand(5, 6), rtol=1e-12, atol=0)
    drawn = [expert_router_coupling_loss(router, torch.ones(5, 2, 6, dtype=torch.float64)) for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_wrong_arguments_of_o_v_and_erc_are_refused() -> None:
    with pytest.raises(ValueError, match="sideways"):
        orthogonality_loss(torch.ones(1, 2, 3), "sideways")
    with pytest.raises(ValueError, match="sideways"):
        routing_variance_loss(torch.ones(1, 2), "sideways")
    with pytest.raises(ValueError, match="two experts"):
        expert_router_coupling_loss(torch.ones(1, 2), torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="negative"):
        expert_router_coupling_loss(torch.ones(2, 2), torch.ones(2, 3, 2), alpha=-1.0)
