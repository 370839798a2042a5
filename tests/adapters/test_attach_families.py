"""Every family of Transformers: logits stay bitwise the same; terms and gradients equal a token-by-token computation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import moe_reference
from tests.helpers.moe_families import FAMILIES, batch, build
from torchtitan_ext.adapters.transformers import attach

transformers = pytest.importorskip("transformers", reason="the package transformers (extra hf) is not installed")

EVERYDAY = [("mixtral", "grouped_mm"), ("glm4_moe", "eager"), ("gpt_oss", "batched_mm")]
ALL = [(name, implementation) for name in FAMILIES for implementation in ("grouped_mm", "batched_mm", "eager")]
CASES = [
    *EVERYDAY,
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in EVERYDAY),
]
# Weights that bring all terms to a similar size, so that none hides behind another in the gradients.
DEFAULT = {"lb": {"weight": 0.3, "scope": "sequence"}, "z": 0.02, "sp": 1.0, "cp": 0.7, "o": 0.1, "v": 8.0, "erc": 0.5}
VARIANTS: dict[str, Any] = {
    "lb": {"weight": 0.3, "scope": "global"},
    "cp": {"weight": 0.7, "source": "activated"},
    "o": {"weight": 0.1, "variant": "code"},
    "v": {"weight": 8.0, "variant": "code"},
}
KEYS = {"lb": "lb", "cp": "cp-activated", "o": "o-code", "v": "v-code"}
MORE: dict[str, Any] = {
    "lb": {"weight": 0.3, "scope": "microbatch"},
    "cp": {"weight": 0.7, "source": "transition"},
    "v": {"weight": 8.0, "scope": "global"},
}
MORE_KEYS = {"lb": "lb", "cp": "cp-transition", "v": "v-global"}


def reference(model: Any, score: str) -> tuple[Any, dict[str, Tensor]]:
    """The plain model's output, and its terms with their graph."""
    ids, labels = batch()
    with moe_reference.captured(model, score) as layers:
        out = model(input_ids=ids, labels=labels, use_cache=False)
    rows, length = labels.shape
    labelled = torch.zeros(rows, length, dtype=torch.float64)
    labelled[:, :-1] = (labels[:, 1:] != -100).double()
    weights = (labelled / labelled.sum()).flatten()
    sequences = [[*range(row * length, (row + 1) * length)] for row in range(rows)]
    return out, moe_reference.terms(layers, weights, sequences)


def check(name: str, implementation: str, regularizers: dict[str, Any], keys: dict[str, str]) -> None:
    plain = build(name, implementation)
    before, wanted = reference(plain, FAMILIES[name].score)
    weights = {term: one if isinstance(one, float) else one["weight"] for term, one in regularizers.items()}
    objective = sum(weight * wanted[keys.get(term, term)] for term, weight in weights.items())
    objective.backward()

    model = build(name, implementation)
    attached = attach(model, regularizers, add_to_loss=False)
    attached.step = 1
    ids, labels = batch()
    out = model(input_ids=ids, labels=labels, use_cache=False)
    assert torch.equal(out.logits, before.logits)
    attached.penalty(labels).backward()
    found = attached.metrics()
    for term in regularizers:
        value = wanted[keys.get(term, term)].item()
        # The model computes in float32, the reference in float64 from the same float32 tensors.
        assert found[f"reg/{term}"] == pytest.approx(value, rel=1e-6, abs=1e-6), term
    gradients = dict(plain.named_parameters())
    for label, parameter in model.named_parameters():
        other = gradients[label].grad
        if other is None:
            assert parameter.grad is None or not parameter.grad.any(), label
            continue
        assert parameter.grad is not None, label
        scale = other.abs().max().item()
        torch.testing.assert_close(
            parameter.grad,
            other,
            rtol=0,
            atol=1e-5 * max(scale, 0.01),
            msg=lambda text, label=label: f"{label}: {text}",
        )


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_terms_and_gradients_equal_a_token_by_token_computation(name: str, implementation: str) -> None:
    check(name, implementation, DEFAULT, {"lb": "lb-sequence"})


@pytest.mark.parametrize(("regularizers", "keys"), [(VARIANTS, KEYS), (MORE, MORE_KEYS)], ids=["variants", "more"])
@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("dots1", marks=pytest.mark.slow)])
def test_variants_equal_a_token_by_token_computation(
    name: str, regularizers: dict[str, Any], keys: dict[str, str]
) -> None:
    check(name, "grouped_mm", regularizers, keys)
