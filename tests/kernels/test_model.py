"""A small model trains through the kernels as it does without them: same loss, terms, measures and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.interpreter import DEVICE
from titan_moe.config.tables import ActivationCheckpoint, Model, MoE
from titan_moe.model.init import init_weights
from titan_moe.model.moe import Dispatcher
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.parallelize import recompute
from torchtitan_ext.ops import select
from torchtitan_ext.terms import ExpertRows, LayerView, Setting, Terms, build_terms
from torchtitan_ext.terms.specialization import Specialization

SEQ, VOCAB = 10, 40
MOE = MoE(experts=6, top_k=3, hidden_dim=20)
VARIANTS = {
    "exact": {"lb": 0.01, "z": 1e-3, "sp": 0.02, "cp": 0.01},
    "above_chance": {"sp": {"weight": 0.02, "above_chance": True}},
    "sample": {"sp": {"weight": 0.02, "method": "sample", "sample_fraction": 0.5}},
    "sketch": {"sp": {"weight": 0.02, "method": "sketch"}},
    "measured": {"sp": 0.0},
    "none": {},
    "others": {"o": 0.01, "v": 0.01, "erc": 0.1},
}


def network(variant: str, dtype: torch.dtype, moe: MoE = MOE) -> Transformer:
    terms = build_terms(
        VARIANTS[variant], Setting(moe.top_k, moe.hidden_dim), measure=("sp",) if variant == "measured" else ()
    )
    model = Transformer(Model(dim=16, layers=2, heads=2, vocab_size=VOCAB, moe=moe), terms, dtype)
    init_weights(model, seed=1)
    with torch.no_grad():
        for layer in model.moe_modules():
            layer.router.expert_bias[2] = -100.0  # an expert without tokens
    return model.to(DEVICE)


def batch() -> Inputs:
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (2, SEQ + 1), generator=source)
    labelled = torch.rand(2, SEQ, generator=source) > 0.3  # some tokens have no label
    weights = labelled / labelled.sum()
    positions = torch.arange(SEQ)
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    inputs = (
        ids,
        labels,
        torch.zeros_like(ids),
        positions.expand_as(ids),
        weights,
        torch.arange(2),
        torch.tensor(1),
        positions,
    )
    return Inputs(*(x.to(DEVICE) for x in inputs))


def step(model: Transformer) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Cross-entropy, terms and measures; and every gradient."""
    ce, carry = model(batch())
    (ce + model.terms.objective(carry.terms)).backward()
    return [ce.detach(), carry.terms.detach(), carry.sums, carry.counts], {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def compare(
    found: tuple[list[Tensor], dict[str, Tensor]], wanted: tuple[list[Tensor], dict[str, Tensor]], tolerance: float
) -> None:
    for a, b in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        error = (found[1][name] - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max() + 1e-9, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_through_the_kernels_equals_training_without(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    fused = select.fused
    monkeypatch.setattr(select, "fused", lambda x: called.append(x.dtype) or fused(x))
    found = step(network(variant, torch.float32))
    assert called
    assert set(called) == {torch.float32}
    monkeypatch.setattr(select, "TRITON_DEVICES", ())
    compare(found, step(network(variant, torch.float32)), 2e-5)


@pytest.mark.parametrize(("variant", "gated"), [("exact", True), ("none", True), ("sketch", False), ("others", False)])
def test_gates_are_applied_to_z_where_no_term_needs_z_or_y_without_them(
    variant: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are, the layer neither keeps the experts' outputs nor applies gates when it combines."""
    combined = []
    operator = Dispatcher.combine
    monkeypatch.setattr(
        Dispatcher,
        "combine",
        lambda self, y, routed: combined.append(routed.gates is None) or operator(self, y, routed),
    )
    step(network(variant, torch.float32))
    assert combined == [gated] * 2


@pytest.mark.parametrize("top_k", [1, 6])
def test_one_expert_and_all_experts_per_token(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MOE.model_copy(update={"top_k": top_k, "shared_experts": 1, "score": "sigmoid", "normalize_topk": top_k > 1})
    found = step(network("exact" if top_k > 1 else "none", torch.float32, moe))
    monkeypatch.setattr(select, "TRITON_DEVICES", ())
    compare(found, step(network("exact" if top_k > 1 else "none", torch.float32, moe)), 2e-5)


def test_bfloat16_is_no_further_from_float32_than_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels round once where PyTorch's operations round after each."""
    found = step(network("exact", torch.bfloat16))
    monkeypatch.setattr(select, "TRITON_DEVICES", ())
    plain, exact = step(network("exact", torch.bfloat16)), step(network("exact", torch.float32))
    name = next(key for key in exact[1] if key.endswith("experts.gate_up"))

    def error(run: tuple[list[Tensor], dict[str, Tensor]]) -> float:
        return float((run[1][name] - exact[1][name]).norm() / exact[1][name].norm())

    assert error(found) <= 1.2 * error(plain)
    torch.testing.assert_close(found[0][0], exact[0][0], rtol=2e-2, atol=0)


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "selective"])
def test_recomputation_does_not_change_the_step(mode: str) -> None:
    wanted = step(network("exact", torch.float32))
    model = network("exact", torch.float32)
    for block in model.blocks():
        recompute(block, ActivationCheckpoint(mode=mode))  # type: ignore[arg-type]
    compare(step(model), wanted, 1e-7)


def test_a_term_that_overrides_only_observe_is_observed() -> None:
    """Its class inherits sp's `activate`, which would pass over the new `observe`."""
    seen = []

    class Watched(Specialization):
        def observe(self, z_RF: Tensor, view: LayerView, rows: ExpertRows) -> tuple[Tensor, Any]:
            seen.append(z_RF.shape)
            return super().observe(z_RF, view, rows)

    model, other = network("exact", torch.float32), network("exact", torch.float32)
    options = Specialization.Options(weight=0.02)
    for layer in model.moe_modules():
        layer.terms = model.terms = Terms(
            [Watched(options, t.setting) if t.name == "sp" else t for t in layer.terms.terms]
        )
    compare(step(model), step(other), 2e-5)
    assert len(seen) == 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["exact", "none"])
def test_compiled_blocks_are_one_graph_and_take_the_same_step(variant: str) -> None:
    wanted = step(network(variant, torch.float32))
    model = network(variant, torch.float32)
    torch._dynamo.reset()
    for block in model.blocks():
        block.compile(backend="aot_eager", fullgraph=True)
    compare(step(model), wanted, 1e-5)
