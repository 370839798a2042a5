"""The network as a whole: cross-entropy, causality, documents, initial values, counts, and what may not change a result."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.networks import (
    BATCH,
    SEQ,
    VOCAB,
    WEIGHTS,
    assert_same_step,
    batch,
    config_with,
    network,
    settings,
    step,
)
from tests.helpers.spy import spy_on
from titan_moe.config.load import load_config
from titan_moe.config.tables import ActivationCheckpoint
from titan_moe.estimate.counts import count, meta_model
from titan_moe.model.head import chunked_cross_entropy
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.mesh import single
from titan_moe.parallel.parallelize import parallelize
from titan_moe.train.inputs import to_inputs
from torchtitan_ext.losses import (
    coupling_loss,
    expert_router_coupling_loss,
    load_balance_loss,
    orthogonality_loss,
    router_z_loss,
    routing_variance_loss,
    specialization_loss,
)
from torchtitan_ext.ops import draws
from torchtitan_ext.ops.response import coupling_noise


@pytest.mark.parametrize(
    ("source", "form", "above_chance"),
    [("all", "mass", False), ("activated", "log", True), ("all", "log", True), ("transition", "mass", False)],
)
def test_terms_in_the_carry_are_the_library_functions(source: str, form: str, above_chance: bool) -> None:
    """What blocks accumulate equals the plain functions on the labelled tokens' routing, collected from outside."""
    options = {"cp_source": source, "cp_form": form, "sp_above_chance": above_chance}
    model, whole = network(scope="microbatch", **options), batch()
    spy = spy_on(model)
    out = model(to_inputs(whole, torch.float64, torch.device("cpu"), step=7))
    keep = whole.loss_mask.flatten()
    views = spy.views
    logits, scores, ids = ([getattr(v, n)[keep] for v in views] for n in ("logits_TE", "scores_TE", "topk_ids_TK"))
    z, y = (
        [rows[v.rows_TK][keep] for v, rows in zip(views, sorted_rows, strict=True)]
        for sorted_rows in ([v.z_RF for v in views], [v.y_RD for v in views])
    )
    gates = [
        torch.zeros_like(s).scatter(1, i, s.gather(1, i) / s.gather(1, i).sum(1, keepdim=True))
        for s, i in zip(scores, ids, strict=True)
    ]
    coupled = []
    for layer, moe in enumerate(model.moe_modules()):
        router, gate = moe.router.weight, moe.experts.gate_up[:, 0]
        key, ranges = (draws.ERC_NOISE, 0, layer, 7), {"rows_B": torch.arange(6), "columns_S": torch.arange(16)}
        uniform = draws.keyed_uniform(*key, **ranges, device=router.device, dtype=torch.float64)
        coupled.append(expert_router_coupling_loss(router, gate, 1.0, coupling_noise(router.detach(), uniform)))
    wanted = torch.stack(
        [
            sum(load_balance_loss(s, i) for s, i in zip(scores, ids, strict=True)),
            sum(router_z_loss(q) for q in logits),
            sum(specialization_loss(x, above_chance=above_chance) for x in z),
            coupling_loss(scores, 2, source, ids, form=form),
            sum(orthogonality_loss(x) for x in y),
            sum(routing_variance_loss(g) for g in gates),
            sum(coupled),
        ]
    )
    torch.testing.assert_close(out.carry.terms[:-1], wanted, rtol=1e-12, atol=0)
    parameters = [
        p for name, p in model.named_parameters() if name != "norm.weight"
    ]  # the last norm is the head's alone
    ours = torch.autograd.grad(model.terms.objective(out.carry.terms) + out.ce, parameters, retain_graph=True)
    theirs = torch.autograd.grad(out.ce + wanted @ wanted.new_tensor(list(WEIGHTS.values())), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    counts = torch.stack([torch.bincount(i.flatten(), minlength=6) for i in ids])
    assert torch.equal(out.carry.counts, counts)
    overlap = torch.stack([specialization_loss(x) for x in z]) / 2  # the measure is of whole squared cosines
    torch.testing.assert_close(out.carry.sums[:, model.terms.measures.index("overlap")], overlap, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("micro", [2, 1])
@pytest.mark.parametrize("method", ["exact", "sample", "sketch"])
@pytest.mark.parametrize("source", ["all", "activated"])
def test_accumulation_does_not_change_the_step(
    dtype: torch.dtype, tolerance: float, micro: int, method: str, source: str
) -> None:
    """All seven terms; the estimators draw by sequence and position, not by micro-batch."""
    model, whole = network(dtype, sp_method=method, sp_sample_fraction=0.5, cp_source=source), batch()
    assert_same_step(step(model, whole, micro), step(model, whole, BATCH), tolerance)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("method", ["exact", "sample"])
def test_recomputation_does_not_change_the_step(mode: str, dtype: torch.dtype, tolerance: float, method: str) -> None:
    plain, recomputed, whole = network(dtype, sp_method=method), network(dtype, sp_method=method), batch()
    parallelize(
        recomputed, config_with(activation_checkpoint=ActivationCheckpoint(mode=mode)), single(torch.device("cpu"))
    )
    assert [n for n, _ in recomputed.named_parameters()] == [n for n, _ in plain.named_parameters()]
    ours, theirs = step(recomputed, whole, 2), step(plain, whole, 2)
    assert_same_step(ours, theirs, tolerance)
    assert ours[1].counts.sum() == 3 * 2 * whole.label_count  # layers * k * labelled tokens: nothing counted twice


def test_recomputation_never_chooses_again() -> None:
    """A choice that would fall otherwise in the backward pass (here: the bias has moved) must not be taken again."""
    model, reference, whole = network(), network(), batch()
    parallelize(
        model, config_with(activation_checkpoint=ActivationCheckpoint(mode="full")), single(torch.device("cpu"))
    )
    inputs = to_inputs(whole, torch.float64, torch.device("cpu"))
    out, expected = model(inputs), reference(inputs)
    for moe in model.moe_modules():
        moe.router.expert_bias.copy_(torch.randn(6, generator=torch.Generator().manual_seed(1)) * 100)
    (out.ce + model.terms.objective(out.carry.terms)).backward()
    (expected.ce + reference.terms.objective(expected.carry.terms)).backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-14, msg=name)


def test_cross_entropy_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_moe.model.head.SLICE_LOGITS", 3 * VOCAB)
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64, generator=source).requires_grad_()
    weight = torch.randn(VOCAB, 8, dtype=torch.float64, generator=source).requires_grad_()
    labels = torch.randint(0, VOCAB, (10,), generator=source)
    weights = torch.rand(10, dtype=torch.float64, generator=source) * (torch.arange(10) != 4)
    ours = chunked_cross_entropy(hidden, weight, labels, weights)
    theirs = (F.cross_entropy(hidden @ weight.t(), labels, reduction="none") * weights).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours * 3, (hidden, weight)), torch.autograd.grad(theirs * 3, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def logits(
    model: Transformer, tokens: Tensor, documents: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    zeros = torch.zeros_like(tokens)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) if positions is None else positions
    weights = torch.full(tokens.shape, 1 / tokens.numel(), dtype=torch.float64)
    documents = zeros if documents is None else documents
    sequences = torch.arange(len(tokens))
    places = torch.arange(tokens.shape[1])
    return model.logits(Inputs(tokens, tokens, documents, positions, weights, sequences, torch.tensor(0), places))


def test_no_token_sees_a_later_one() -> None:
    model = network()
    tokens = torch.randint(0, VOCAB, (1, SEQ), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % VOCAB
    before, after = logits(model, tokens), logits(model, changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-13, atol=1e-14)
    assert not torch.allclose(after[:, 7:], before[:, 7:])


def test_document_mask_makes_packed_documents_independent() -> None:
    model = network(model=settings().model_copy(update={"document_mask": True}))
    tokens = torch.randint(0, VOCAB, (1, SEQ), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(SEQ) >= 5).long().unsqueeze(0)
    positions = torch.cat([torch.arange(5), torch.arange(SEQ - 5)]).unsqueeze(0)
    packed = logits(model, tokens, documents, positions)
    torch.testing.assert_close(packed[:, 5:], logits(model, tokens[:, 5:]), rtol=1e-12, atol=1e-13)


def test_initial_weights_depend_on_seed_and_global_name_only() -> None:
    small, large = network(model=settings(experts=4)), network(model=settings(experts=8))
    a, b = dict(small.named_parameters()), dict(large.named_parameters())
    for name in ("layers.1.moe.experts.gate_up", "layers.2.moe.experts.down"):
        assert torch.equal(a[name], b[name][:4])  # an expert's values do not depend on how many stand beside it
        assert not torch.equal(b[name][0], b[name][1])
    assert torch.equal(a["layers.0.attention.wq.weight"], b["layers.0.attention.wq.weight"])
    other = dict(network(model=settings(experts=4), seed=1).named_parameters())
    assert not torch.equal(a["embedding"], other["embedding"])


def test_initial_scale() -> None:
    """Outputs of a layer start near unit scale: variance 1/fan-in; three sigma of a standard deviation from n draws."""
    weight = dict(network(model=settings(hidden_dim=64)).named_parameters())["layers.0.moe.experts.gate_up"]
    truncation = 0.9866  # standard deviation of a unit normal cut off at three deviations
    assert weight.std().item() * 4 == pytest.approx(truncation, rel=3 / (2 * weight.numel()) ** 0.5)


def test_counts_of_a_model_counted_by_hand() -> None:
    model = meta_model(settings(shared_experts=1, first_dense_layers=1), torch.float32)
    counts = count(model, seq_len=100)
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16
    expert = 3 * 16 * 10
    norms = 3 * (2 * 16 + 2 * 4) + 16
    trunk = VOCAB * 16 + 3 * attention + norms + 3 * expert  # the dense layer is as wide as k + shared experts
    assert counts.total == trunk + 2 * (6 * 16 + 7 * expert)
    assert counts.active == trunk + 2 * (6 * 16 + 3 * expert)
    assert counts.flops_per_token == 6 * (counts.active - norms) + 6 * 100 * 3 * 16


@pytest.mark.parametrize(
    ("name", "total", "active"), [("small", 0.4e9, 80e6), ("medium", 1.1e9, 100e6), ("large", 7.0e9, 500e6)]
)
@pytest.mark.parametrize("style", ["", "_deepseek"])
def test_scales_have_the_papers_sizes(name: str, style: str, total: float, active: float) -> None:
    config = load_config(name + style)
    counts = count(meta_model(config.model, torch.bfloat16), config.training.seq_len)
    assert counts.total == pytest.approx(total, rel=0.02)
    assert counts.active == pytest.approx(active, rel=0.02)


def test_bfloat16_keeps_float32_masters_and_stays_near_float32() -> None:
    """One rounding to bfloat16 is 2^-9 relative; a loss of order log V through three layers moves by well under 2%."""
    exact, rounded, whole = network(torch.float32), network(torch.bfloat16), batch()
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    ours, theirs = step(rounded, whole, BATCH), step(exact, whole, BATCH)
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    assert ours[1].terms.dtype == torch.float32
