"""The coupling loss and its top-k against definitions written as plain loops, values and gradients, in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.helpers import reference
from tests.helpers.losses import EXPERTS, KS, LAYERS, TOKENS, assert_same, generator, routing
from torchtitan_ext.losses import coupling_loss, load_balance_loss
from torchtitan_ext.ops.routing import largest_ids


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("source", ["all", "activated"])
def test_coupling_equals_the_triple_sum(k: int, source: str) -> None:
    _, scores, ids = routing(k, layers=LAYERS)
    value = coupling_loss(scores, k, source, ids)
    wanted = reference.coupling(scores, k, source, ids)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-14)
    for a, b in zip(torch.autograd.grad(value, scores), torch.autograd.grad(wanted, scores), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("source", ["all", "activated"])
def test_coupling_of_unnormalised_scores_and_of_ties(source: str) -> None:
    scores = [torch.rand(TOKENS, EXPERTS, dtype=torch.float64, generator=generator(s)) for s in range(3)]
    scores[1][2] = 0.5  # all equal: every choice of k experts has the same mass
    ids = [s.topk(3).indices for s in scores]
    value = coupling_loss(scores, 3, source, ids)
    torch.testing.assert_close(value, reference.coupling(scores, 3, source, ids), rtol=1e-12, atol=0)


@pytest.mark.parametrize("source", ["all", "activated"])
def test_coupling_in_logarithmic_form_equals_its_definition(source: str) -> None:
    """Definition: minus the mean over tokens of the logarithm of the token's own triple sum (with positive sign)."""
    _, scores, ids = routing(3, layers=2)

    def definition(*scores: Tensor) -> Tensor:
        parts = [
            reference.coupling([s[i : i + 1] for s in scores], 3, source, [x[i : i + 1] for x in ids])
            for i in range(TOKENS)
        ]
        return sum(-torch.log(-part) for part in parts) / TOKENS

    assert_same(lambda *s: coupling_loss(s, 3, source, ids, form="log"), definition, *scores)


def test_only_the_logarithmic_form_has_a_gradient_independent_of_the_number_of_experts() -> None:
    """Near uniform routing the gradient of the mass with respect to a logit is proportional to 1/E."""
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
def test_coupling_has_the_minimum_of_proposition_c7(source: str) -> None:
    """It is at least -(L-1), which balanced routing with all mass on the same k experts in every layer reaches."""
    _, scores, ids = routing(2, layers=LAYERS)
    assert coupling_loss(scores, 2, source, ids).item() > -(LAYERS - 1)
    k, tokens = 2, EXPERTS
    best = torch.zeros(tokens, EXPERTS, dtype=torch.float64)
    chosen = torch.tensor([[i % EXPERTS, (i + 3) % EXPERTS] for i in range(tokens)])
    best.scatter_(1, chosen, torch.tensor([0.7, 0.3], dtype=torch.float64).expand(tokens, k))
    reached = coupling_loss([best] * LAYERS, k, source, [chosen] * LAYERS)
    assert reached.item() == pytest.approx(-(LAYERS - 1), abs=1e-14)
    # That routing is balanced: its lb is 1.
    assert load_balance_loss(best, chosen).item() == pytest.approx(1.0, abs=1e-14)


def test_coupling_by_transitions_equals_its_definition() -> None:
    """Definition: loops over the transition matrix. A permutation between layers gives -1, uniform routing after it
    -1/E."""
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
def test_largest_ids_equal_topk_with_ties_by_index_and_nan_first(dtype: torch.dtype, experts: int, count: int) -> None:
    """Also for strided input and bfloat16."""
    scores = torch.rand(40, 2 * experts, dtype=dtype, generator=generator(8))[:, ::2]
    chosen_ids = largest_ids(scores, count)
    assert torch.equal(chosen_ids, scores.topk(count, dim=-1).indices)
    tied = (scores * 4).floor()
    order = tied.argsort(dim=-1, descending=True, stable=True)[:, :count]
    assert torch.equal(largest_ids(tied, count), order)
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


def test_wrong_arguments_of_coupling_are_refused() -> None:
    _, scores, _ = routing(2, layers=2)
    with pytest.raises(ValueError, match="sideways"):
        coupling_loss(scores, 2, "sideways")
    with pytest.raises(ValueError, match="topk_ids"):
        coupling_loss(scores, 2, "activated")
    with pytest.raises(ValueError, match="'linear' is not one of 'mass', 'log'"):
        coupling_loss(scores, 2, form="linear")
    with pytest.raises(ValueError, match="form='log' takes each token's mass"):
        coupling_loss(scores, 2, "transition", form="log")
