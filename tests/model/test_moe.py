"""The MoE layer against a token-by-token version without dispatch, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.config.tables import Model, MoE
from titan_moe.model.gemm import grouped_linear
from titan_moe.model.init import init_weights
from titan_moe.model.moe import MoELayer, plan_dispatch
from titan_moe.model.transformer import Transformer
from torchtitan_ext.carry import empty_carry
from torchtitan_ext.ops import native
from torchtitan_ext.terms import REGISTRY, ModelFacts, Setting, Terms, Tokens, build_terms

DIM, TOKENS = 12, 9


def layer(moe: MoE, terms: Terms | None = None) -> MoELayer:
    model = Model(dim=DIM, layers=1, heads=2, vocab_size=32, moe=moe)
    network = Transformer(model, terms or Terms(), torch.float64)
    init_weights(network, seed=3)
    return network.moe_modules()[0]


def one_by_one(moe_layer: MoELayer, x: Tensor, chosen: Tensor) -> Tensor:
    """The definition: every token through its experts, weighted by its gates."""
    moe, experts = moe_layer.router.moe, moe_layer.experts
    rows = []
    for i, token in enumerate(x):
        q = moe_layer.router.weight @ token
        s = q.softmax(0) if moe.score == "softmax" else q.sigmoid()
        gates = s[chosen[i]]
        if moe.normalize_topk:
            gates = gates / gates.sum()
        out = torch.zeros(DIM, dtype=x.dtype)
        for gate, e in zip(gates * moe.route_scale, chosen[i], strict=True):
            gate_proj, up_proj = experts.gate_up[e]
            out = out + gate * (experts.down[e] @ (F.silu(gate_proj @ token) * (up_proj @ token)))
        if moe_layer.shared is not None:
            gate_proj, up_proj = moe_layer.shared.gate.weight, moe_layer.shared.up.weight
            out = out + moe_layer.shared.down.weight @ (F.silu(gate_proj @ token) * (up_proj @ token))
        rows.append(out)
    return torch.stack(rows)


VARIANTS = [
    MoE(experts=6, top_k=2, hidden_dim=5),
    MoE(experts=6, top_k=1, hidden_dim=5),
    MoE(experts=6, top_k=6, hidden_dim=5),
    MoE(experts=6, top_k=3, hidden_dim=5, score="sigmoid", normalize_topk=True, route_scale=2.5, shared_experts=2),
]


@pytest.mark.parametrize("moe", VARIANTS, ids=lambda m: f"k{m.top_k}-{m.score}")
def test_layer_equals_the_token_by_token_definition(moe: MoE) -> None:
    moe_layer = layer(moe)
    with torch.no_grad():
        moe_layer.router.expert_bias[0] = -100.0 if moe.top_k < 6 else 0.0  # an expert that gets no token
    x = torch.randn(TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    carry = empty_carry(0, TOKENS, 1, moe.experts, torch.float64, x.device, 0, len(moe_layer.terms.measures))
    weights = torch.full((1, TOKENS), 1 / TOKENS, dtype=torch.float64)
    tokens = Tokens(weights, torch.zeros(1, dtype=torch.int64), torch.tensor(1), torch.arange(TOKENS))
    out, after, chosen = moe_layer(x, carry, tokens)
    choice, _ = moe_layer.router(x)
    scores = choice.scores_TE
    assert torch.equal(after.counts[0], torch.bincount(chosen.flatten(), minlength=moe.experts))
    if moe.top_k < 6:
        assert after.counts[0, 0] == 0
        assert torch.equal(chosen.sort(1).values, scores[:, 1:].topk(moe.top_k).indices.add(1).sort(1).values)
    wanted = one_by_one(moe_layer, x, chosen)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-13)
    probe = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = [x, *moe_layer.parameters()]
    ours = torch.autograd.grad((out * probe).sum(), inputs)
    theirs = torch.autograd.grad((wanted * probe).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_the_bias_enters_the_choice_only() -> None:
    moe_layer = layer(MoE(experts=6, top_k=2, hidden_dim=5))
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    before, _ = moe_layer.router(x)
    moe_layer.router.expert_bias[4] = 10.0
    after, _ = moe_layer.router(x)
    assert bool((after.topk_ids_TK == 4).any(1).all())
    torch.testing.assert_close(after.gates_TK, after.scores_TE.gather(1, after.topk_ids_TK), rtol=0, atol=0)
    torch.testing.assert_close(after.scores_TE, before.scores_TE, rtol=0, atol=0)


def test_dispatch_is_a_permutation_sorted_by_expert() -> None:
    ids = torch.tensor([[3, 1], [1, 0], [3, 0], [1, 3]])
    plan = plan_dispatch(ids, 5)
    assert plan.offsets_E.tolist() == [2, 5, 5, 8, 8]
    assert sorted(plan.rows_TK.flatten().tolist()) == list(range(8))
    for i in range(4):
        for a in range(2):
            row = int(plan.rows_TK[i, a])
            assert int(plan.tokens_R[row]) == i
            assert sum(row >= end for end in plan.offsets_E.tolist()) == int(ids[i, a])


@pytest.fixture(params=[True, False], ids=["tiles of the CPU", "a product per expert"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a CPU to multiply bfloat16."""
    if not request.param:
        monkeypatch.setattr(native, "tiles", lambda: False)
    elif not native.tiles():
        pytest.skip("this CPU has no tiles of bfloat16 (AMX), or there is no C compiler")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("tiles")
def test_grouped_linear(dtype: torch.dtype) -> None:
    """Against one product per row. bfloat16: inputs are exact, the result is rounded once (2^-8 covers the sum's order)."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(7, 16, generator=source).to(dtype).requires_grad_()
    weight = torch.randn(4, 8, 16, generator=source).to(dtype).requires_grad_()
    offsets = torch.tensor([3, 3, 7, 7], dtype=torch.int32)
    expert = [0, 0, 0, 2, 2, 2, 2]
    out = grouped_linear(x, weight, offsets)
    assert out.dtype == dtype
    wanted = torch.stack([weight[e].double() @ row.double() for e, row in zip(expert, x, strict=True)])
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    probe = torch.randn(out.shape, generator=source).to(dtype)
    ours = torch.autograd.grad(out, (x, weight), probe)
    theirs = torch.autograd.grad((wanted * probe.double()).sum(), (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=4 * tolerance)
    assert not ours[1][1].any()
    assert not ours[1][3].any()


@pytest.mark.parametrize("counts", [[1, 40, 17, 0, 200, 3], [0, 0, 300], [5, 16, 1, 1, 1]])
@pytest.mark.usefixtures("tiles")
def test_grouped_linear_in_bfloat16_with_float32_weights(counts: list[int]) -> None:
    """Equals a float64 computation on the rounded values, for numbers of rows that are and are not multiples of 16.

    Output and gradients are rounded to bfloat16 at most once, and the sums in between are float32: 2^-7 of the largest
    value covers both.
    """
    source = torch.Generator().manual_seed(0)
    rows, experts = sum(counts), len(counts)
    x = torch.randn(rows, 32, generator=source).bfloat16().requires_grad_()
    weight = torch.randn(experts, 24, 32, generator=source).requires_grad_()
    offsets = torch.tensor(counts).cumsum(0).int()
    out = grouped_linear(x, weight, offsets)
    probe = torch.randn(out.shape, generator=source).bfloat16()
    ours = (out, *torch.autograd.grad(out, (x, weight), probe))
    assert [part.dtype for part in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]

    exact_x, exact_weight = x.detach().double(), weight.detach().bfloat16().double()
    start = 0
    for e, count in enumerate(counts):
        part = slice(start, start := start + count)
        wanted = (
            exact_x[part] @ exact_weight[e].t(),
            probe[part].double() @ exact_weight[e],
            probe[part].double().t() @ exact_x[part],
        )
        for value, right in zip((ours[0][part], ours[1][part], ours[2][e]), wanted, strict=True):
            bound = 2**-7 * float(right.abs().max()) if right.numel() else 0.0
            torch.testing.assert_close(value.double(), right, rtol=0, atol=bound)


def test_grouped_linear_is_a_well_behaved_operator() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.titan_moe.grouped_linear.default, (x, weight, offsets))


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (4, 4), (1, 1)])
@pytest.mark.parametrize("name", list(REGISTRY))
def test_a_term_says_where_it_has_no_gradient(name: str, experts: int, top_k: int) -> None:
    """`problems` or `without_effect` name exactly the models in which no parameter gets a gradient from the term."""
    facts, options = ModelFacts(experts, top_k, 2), REGISTRY[name].Options(weight=1.0)
    terms, moe = build_terms({name: options}, Setting(top_k, 8)), MoE(experts=experts, top_k=top_k, hidden_dim=8)
    layers = [MoELayer(8, moe, terms, layer) for layer in range(2)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    for seed, parameter in enumerate(parameters):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    h, tokens = torch.randn(12, 8, generator=torch.Generator().manual_seed(9)), 12
    view = Tokens(torch.full((2, 6), 1 / 12), torch.arange(2), torch.tensor(1), torch.arange(6))
    widths = (terms.carried_width(experts), len(terms.measures), terms.sums_width(experts))
    carry = empty_carry(1, tokens, 2, experts, h.dtype, h.device, *widths)
    for layer in layers:
        h, carry, _ = layer(h, carry, view)
    gradients = torch.autograd.grad(terms.complete(carry).terms.sum(), parameters, allow_unused=True)
    # Softmax scores sum to 1 up to rounding, so a term that is constant has a gradient of rounding errors.
    trained = any(gradient is not None and gradient.abs().max() > 1e-5 for gradient in gradients)
    named = REGISTRY[name].without_effect(options, facts) or list(REGISTRY[name].problems(options, facts))
    assert trained != bool(named)
