"""Values that are small or large enough for sums, squares and products to leave the range of their dtype."""

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.losses import generator
from titan_moe.config.tables import MoE
from titan_moe.model.moe import MoELayer, Router
from torchtitan_ext.carry import empty_carry
from torchtitan_ext.losses import (
    load_balance_loss,
    orthogonality_loss,
    sketched_specialization_loss,
    specialization_loss,
)
from torchtitan_ext.metrics import expert_overlap, expert_response, routing_entropy, token_entropy, topk_mass
from torchtitan_ext.ops import draws, select
from torchtitan_ext.ops.gram import gram_through, squared_cosines
from torchtitan_ext.ops.routing import normalize_scores
from torchtitan_ext.terms import Setting, Tokens, build_terms

TOKENS, K, WIDTH = 6, 3, 35
# Factors of the rows of a token: all alike, very different ones, and a zero row.
FACTORS = {
    torch.float32: [1e-20, 1e19, 1e-37, 1e35, (1e-20, 1.0, 1e19), (0.0, 1e-20, 1e-25)],
    torch.float64: [1e-170, 1e160, 1e-300, 1e290, (1e-200, 1.0, 1e200), (0.0, 1e-170, 1e-180)],
}
FACTORS[torch.bfloat16] = FACTORS[torch.float32]


def wanted(z: Tensor) -> tuple[Tensor, Tensor]:
    """sp and its gradient with respect to rows of length 1 / sqrt(width), in float64."""
    z = z.double().requires_grad_()
    unit = F.normalize(z, dim=-1, eps=0.1)
    cosines = unit @ unit.transpose(1, 2)
    value = (cosines.square().sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).square().sum(1)).mean()
    return value.detach(), torch.autograd.grad(value, z)[0]


def gradient(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("dtype", list(FACTORS))
def test_sp_does_not_depend_on_the_length_of_activations(
    dtype: torch.dtype, through: bool, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of row z is that of a z as long as 1, divided by the factor."""
    if not by_kernel:
        monkeypatch.setattr(select, "KERNELS", ())
    rows = torch.arange(TOKENS * K).reshape(TOKENS, K)
    plain = torch.randn(TOKENS, K, WIDTH, dtype=torch.float64, generator=generator(0))
    plain = (plain + torch.randn(TOKENS, 1, WIDTH, dtype=torch.float64, generator=generator(1))).to(dtype)
    tolerance = max(200 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps, 2 * torch.finfo(dtype).eps)
    for factor in FACTORS[dtype]:
        factors = torch.tensor(factor, dtype=torch.float64).expand(K).clone()
        factors = torch.where(factors > 0, torch.exp2(factors.log2().round()), 0.0)  # powers of two: z is exact
        z = plain.double().clone()
        z[1:] *= factors[:, None]  # the first token stays as it is
        z = z.to(dtype)
        value, slopes = wanted(
            torch.where(factors[:, None] > 0, plain, 0.0).index_copy(0, torch.tensor([0]), plain[:1])
        )
        # A weight keeps gradients of order 1 / factor inside the range.
        scale = 2.0**-20
        z.requires_grad_()
        if through:
            _, gram = gram_through(z.flatten(0, 1), rows, scaled=True)
            found = squared_cosines(gram).mean()
        else:
            found = specialization_loss(z)
        torch.testing.assert_close(found.double(), value, rtol=tolerance, atol=0)
        slopes[1:] = torch.where(factors[:, None] > 0, slopes[1:] / factors[:, None], 0.0)
        slopes = (slopes * scale).to(dtype)
        got = gradient(found * scale, z)
        largest = slopes.double().abs().amax(2, keepdim=True)
        allowed = tolerance * largest + torch.finfo(dtype).tiny
        assert ((got.double() - slopes.double()).abs() <= allowed).all(), (factor, got, slopes)
        torch.testing.assert_close(expert_overlap(z).double(), value / (K * (K - 1)), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [2.0**-66, 2.0**63, 2.0**-110])
def test_sketched_sp_does_not_depend_on_the_length_of_activations(dtype: torch.dtype, factor: float) -> None:
    rows = torch.arange(TOKENS * K).reshape(TOKENS, K)
    z = torch.randn(TOKENS * K, WIDTH, generator=generator(0)).to(dtype)
    signs = draws.keyed_signs(0, torch.arange(TOKENS), width=WIDTH, device=z.device)
    sketch = draws.keyed_signs(1, torch.arange(32), width=WIDTH, device=z.device)
    plain, scaled = z.clone().requires_grad_(), (z * factor).requires_grad_()
    values = [sketched_specialization_loss(x, rows, sketch, signs) * 2.0**-20 for x in (plain, scaled)]
    tolerance = 4 * torch.finfo(dtype).eps * WIDTH
    torch.testing.assert_close(values[1], values[0], rtol=tolerance, atol=0)
    slopes = gradient(values[0], plain).float()
    torch.testing.assert_close(
        gradient(values[1], scaled).float() * factor, slopes, rtol=0, atol=tolerance * slopes.abs().max().item()
    )


@pytest.mark.parametrize("method", ["exact", "sample", "sketch", "control"])
@pytest.mark.parametrize("factor", [1e-20, 1e19])
def test_every_method_of_the_term_is_finite(method: str, factor: float) -> None:
    """In the model's layer: the activations are proportional to the weights of the up projection."""
    dim, values = 8, []
    moe = MoE(experts=5, top_k=K, hidden_dim=WIDTH)
    options: dict[str, Any] = {"sp": {"weight": 1.0, "method": method, "sample_fraction": 1.0}}
    if method == "control":  # sp of other pairs of experts
        import_module("titan_moe.analysis.controls")
        options = {"shuffled": 1.0}
    terms = build_terms(options, Setting(K, WIDTH))
    weights, sequences, positions = torch.full((1, TOKENS), 1 / TOKENS), torch.arange(1), torch.arange(TOKENS)
    tokens = Tokens(weights, sequences, torch.tensor(1), positions)
    for scale in (1.0, factor):
        layer = MoELayer(dim, moe, terms, 0)
        for seed, weight in enumerate(layer.parameters()):
            torch.nn.init.normal_(weight, generator=generator(seed))
        with torch.no_grad():
            layer.experts.gate_up[:, 1] *= scale
        carry = empty_carry(1, TOKENS, 1, 5, torch.float32, weights.device, 0, len(terms.measures))
        _, carry, _ = layer(torch.randn(TOKENS, dim, generator=generator(9)), carry, tokens)
        values.append(carry.terms.item())
        if method != "control":
            assert carry.sums[0, terms.measures.index("overlap")].item() == pytest.approx(values[-1] / (K * (K - 1)))
        slopes = gradient(carry.terms.sum() * 2.0**-20, layer.experts.gate_up)
        assert slopes.isfinite().all()
        assert slopes.any()
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_o_is_the_squared_length_of_projections_of_large_outputs() -> None:
    """Squares of inner products overflow float32 above lengths of about 4e9; the value itself only above 1e19."""
    y = torch.randn(TOKENS, K, WIDTH, generator=generator(3))
    for factor in (2.0**20, 2.0**34, 2.0**55):
        exact, large = (y.double() * factor).requires_grad_(), (y * factor).requires_grad_()
        value, expected = (orthogonality_loss(x) for x in (large, exact))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
        slopes = gradient(expected, exact)
        torch.testing.assert_close(
            gradient(value, large).double(), slopes, rtol=0, atol=1e-4 * slopes.abs().max().item()
        )


OFFSETS = [-50.0, -85.0, -100.0, -1e4]


@pytest.mark.parametrize("offset", OFFSETS)
def test_normalised_sigmoids_that_underflow_equal_those_of_float64(offset: float) -> None:
    """Far below 0 a sigmoid is an exponential, so the normalised scores tend to the softmax of the logits."""
    logits = (torch.randn(TOKENS, 5, generator=generator(4)) + offset).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    scores = normalize_scores(logits.sigmoid(), F.logsigmoid(logits))
    expected = F.logsigmoid(exact).softmax(-1)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-9)
    probe = torch.randn(TOKENS, 5, generator=generator(5))
    slopes = gradient((expected * probe).sum(), exact)
    torch.testing.assert_close(gradient((scores * probe).sum(), logits).double(), slopes, rtol=1e-4, atol=1e-6)


def test_rows_of_zeros_or_of_very_small_scores_are_normalised() -> None:
    small = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e-40, 3e-40, 0.0, 0.0], [0.1, 0.3, 0.0, 0.0]], requires_grad=True)
    scores = normalize_scores(small)
    expected = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.25, 0.75, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0]])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)
    slopes = gradient(scores[:, 0].sum(), small)
    assert not slopes[:2].any()
    torch.testing.assert_close(slopes[2], torch.tensor([1.875, -0.625, -0.625, -0.625]), rtol=1e-5, atol=0)
    ids = torch.tensor([[0, 1]] * 3)
    assert load_balance_loss(small, ids).item() == pytest.approx(4 * 0.5 * (0.5 + 1.0 + 1.0) / 3, rel=1e-4)
    assert routing_entropy(torch.zeros(3, 4)).item() == pytest.approx(1.3863, rel=1e-4)
    assert topk_mass(torch.zeros(3, 4), ids).item() == 0.5


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_router_is_finite_when_chosen_scores_underflow(score: str, normalize: bool) -> None:
    """Also if only the chosen ones do, because the balancing bias chose them."""
    moe = MoE(experts=4, top_k=2, score=score, normalize_topk=normalize)  # type: ignore[arg-type]
    router = Router(1, moe)
    for weight, bias in (([-100.0] * 4, [0.0] * 4), ([0.0, -200.0, -200.0, -300.0], [-3.0, 3.0, 3.0, 0.0])):
        with torch.no_grad():
            router.weight.copy_(torch.tensor(weight).unsqueeze(1))
            router.expert_bias.copy_(torch.tensor(bias))
        choice, _ = router(torch.ones(1, 1))
        assert choice.scores_TE.sum().item() == pytest.approx(1.0, rel=1e-6)
        if normalize:
            torch.testing.assert_close(choice.gates_TK, torch.full((1, 2), 0.5))
        assert gradient(choice.gates_TK[0, 0] + choice.scores_TE[0, 1], router.weight).isfinite().all()


def test_the_entropy_of_scores_that_are_0_has_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, -200.0, 0.0]], requires_grad=True)
    entropy = token_entropy(logits.softmax(-1)).sum()
    assert entropy.item() == pytest.approx(0.6931, rel=1e-4)
    assert gradient(entropy, logits).isfinite().all()


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_measures_of_router_and_gate_weights_do_not_depend_on_their_length(factor: float) -> None:
    router, gate = (torch.randn(4, *shape, generator=generator(6)) for shape in ((8,), (5, 8)))
    torch.testing.assert_close(expert_response(router * factor, gate), expert_response(router, gate))
    torch.testing.assert_close(expert_response(router, gate * factor), expert_response(router, gate))
    assert expert_response(torch.zeros_like(router), gate).isfinite().all()


def test_squared_cosines_of_an_underflown_gram_matrix_are_0() -> None:
    gram = torch.full((2, 2, 2), 1e-40, requires_grad=True)
    value = squared_cosines(gram).sum()
    assert value.item() == 0.0
    assert not gradient(value, gram).any()
