"""The router by kernels, compared with PyTorch's operations, which define it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.interpreter import DEVICE
from titan_moe.config.tables import MoE
from titan_moe.model.moe import Choice, Router
from torchtitan_ext.metrics import token_entropy
from torchtitan_ext.ops import select
from torchtitan_ext.ops.router import RouterSums, choose_experts, route
from torchtitan_ext.ops.routing import labelled_counts

TOKENS, DIM = 21, 12


def close(found: Tensor, wanted: Tensor, tolerance: float = 4e-6) -> None:
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).abs().max() <= tolerance * wanted.double().abs().max()


def definition(choice: Choice, weights: Tensor, k: int) -> RouterSums:
    scores = choice.scores_TE
    return RouterSums(
        choice.logits_TE.logsumexp(-1),
        token_entropy(scores.detach()),
        scores.topk(k).values.sum(1),
        scores.detach().gather(1, choice.topk_ids_TK).sum(1),
        labelled_counts(choice.topk_ids_TK, scores.shape[1], weights),
        (scores * weights[:, None]).sum(0),
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("experts", "k"), [(5, 1), (16, 2), (60, 4), pytest.param(160, 8, marks=pytest.mark.slow)])
def test_the_router_equals_pytorch_in_float64(experts: int, k: int, score: Any, normalize: bool) -> None:
    """Choice, scores, gates, sums, and the gradients through all of them, together and one by one."""
    source = torch.Generator().manual_seed(experts)
    router = Router(DIM, MoE(experts=experts, top_k=k, score=score, normalize_topk=normalize, route_scale=1.5))
    with torch.no_grad():
        router.weight.normal_(generator=source)
        router.expert_bias.normal_(0.0, 0.1, generator=source)
        router.expert_bias[1] = -100.0  # an expert without tokens
    router = router.to(DEVICE)
    exact = Router(DIM, router.moe).double().to(DEVICE)
    exact.load_state_dict(router.state_dict())
    x = (0.5 * torch.randn(TOKENS, DIM, generator=source)).to(DEVICE)
    weights = torch.rand(TOKENS, generator=source).to(DEVICE)
    weights[4] = 0  # a token without label
    (found, found_sums), (wanted, no_sums) = router(x, weights), exact(x.double())
    assert found_sums is not None
    assert no_sums is None
    assert torch.equal(found.topk_ids_TK, wanted.topk_ids_TK)
    sums = definition(wanted, weights.double(), k)
    assert torch.equal(found_sums.counts_E, sums.counts_E)
    assert found_sums.counts_E[1] == 0
    pairs = [(found.scores_TE, wanted.scores_TE), (found.gates_TK, wanted.gates_TK)]
    pairs += [(a, b) for a, b in zip(found_sums, sums, strict=True) if a.is_floating_point()]
    for a, b in pairs:
        close(a, b)
    values = []
    for a, b in pairs:
        if b.requires_grad:
            probe = torch.randn(b.shape, generator=source, dtype=torch.float64).to(DEVICE)
            values.append(((a * probe).sum(), (b * probe).sum()))
    assert len(values) == 5
    for a, b in [*values, tuple(sum(parts) for parts in zip(*values, strict=True))]:
        slopes = (torch.autograd.grad(v, r.weight, retain_graph=True)[0] for v, r in ((a, router), (b, exact)))
        ours, theirs = slopes
        scale = theirs.abs().max() + 1e-2  # gates of one expert that sum to 1 have no gradient
        assert (ours.double() - theirs).abs().max() <= 2e-5 * scale


def test_equal_scores_choose_the_lower_index_and_nan_an_existing_one() -> None:
    logits = torch.zeros(3, 5, device=DEVICE)
    logits[1, 3] = float("nan")
    logits[2] = float("nan")
    ids = choose_experts(logits, torch.zeros(5, device=DEVICE), 3, "sigmoid")
    assert ids[0].tolist() == [0, 1, 2]
    assert ids[1].tolist() == [3, 0, 1]
    assert ids[2].tolist() == [0, 1, 2]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_that_underflow_are_those_of_float64(score: str, normalize: bool) -> None:
    """Sigmoids underflow in float32 when all logits are below about -88, softmax scores of chosen experts as well."""
    source = torch.Generator().manual_seed(3)
    for offset in (-50.0, -100.0, -1e4):
        logits = (torch.randn(4, 6, generator=source) + offset).to(DEVICE).requires_grad_()
        bias = torch.zeros(6, device=DEVICE)
        if score == "softmax":
            logits = torch.tensor([[0.0, -200.0, -201.0, -300.0]], device=DEVICE, requires_grad=True)
            bias = torch.tensor([-3.0, 3.0, 3.0, 0.0], device=DEVICE)
        ids = choose_experts(logits, bias, 2, score)
        weights = torch.ones(len(logits), device=DEVICE)
        scores, gates, _ = route(logits, ids, weights, score, normalize, 1.0)
        exact = logits.detach().double().requires_grad_()
        logs = exact if score == "softmax" else torch.nn.functional.logsigmoid(exact)
        close(scores, logs.softmax(-1), 1e-5)
        chosen = logs.gather(1, ids)
        if normalize:
            close(gates, chosen.softmax(-1), 1e-5)
        (slopes,) = torch.autograd.grad(gates[:, 0].sum() + scores[:, 1].sum(), logits)
        raw = (
            chosen.softmax(-1) if normalize else chosen.exp() if score == "sigmoid" else logs.softmax(-1).gather(1, ids)
        )
        (wanted,) = torch.autograd.grad(raw[:, 0].sum() + logs.softmax(-1)[:, 1].sum(), exact)
        assert (slopes.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-30


def test_other_dtypes_and_calls_without_weights_use_pytorch() -> None:
    router = Router(DIM, MoE(experts=4, top_k=2)).to(DEVICE)
    torch.nn.init.ones_(router.weight)
    assert router(torch.ones(2, DIM, device=DEVICE))[1] is None
    assert select.fused(router.weight)
    double = torch.ones(2, DIM, device=DEVICE, dtype=torch.float64)
    assert router.double()(double, torch.ones(2, device=DEVICE))[1] is None
