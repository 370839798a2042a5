"""Terms do not depend on how a step is split, padded or packed, nor on activation checkpointing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.moe_families import VOCABULARY, build
from torchtitan_ext.adapters.transformers import Attached, attach

pytest.importorskip("transformers", reason="the package transformers (extra hf) is not installed")

TERMS: dict[str, Any] = {
    "lb": {"weight": 0.3, "scope": "sequence"},
    "z": 0.02,
    "sp": 1.0,
    "cp": 0.7,
    "o": 0.1,
    "v": 8.0,
    "erc": 0.5,
}
LENGTHS = [12, 7, 10, 5]
FEW = ["qwen3_moe", pytest.param("glm4_moe", marks=pytest.mark.slow), pytest.param("olmoe", marks=pytest.mark.slow)]


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def labels_of(text: Tensor) -> Tensor:
    """The first label is never used; -100 there is what collators of packed rows set."""
    return torch.cat([torch.tensor([-100]), text[1:]])


COUNT = sum(LENGTHS) - len(LENGTHS)


def attached_model(name: str, implementation: str = "grouped_mm") -> tuple[Any, Attached]:
    model = build(name, implementation)
    attached = attach(model, TERMS)
    attached.step = 1
    return model, attached


def run(model: Any, *batches: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step of several micro-batches, and its gradients."""
    total = 0.0
    for one in batches:
        loss = model(**one, num_items_in_batch=torch.tensor(COUNT), use_cache=False).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def apart() -> list[dict[str, Tensor]]:
    return [{"input_ids": text[None], "labels": labels_of(text)[None]} for text in texts()]


def padded() -> dict[str, Tensor]:
    longest = max(LENGTHS)
    rows = [torch.nn.functional.pad(text, (0, longest - len(text))) for text in texts()]
    labels = [torch.nn.functional.pad(labels_of(text), (0, longest - len(text)), value=-100) for text in texts()]
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in LENGTHS])
    return {"input_ids": torch.stack(rows), "labels": torch.stack(labels), "attention_mask": mask}


def packed() -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat(texts())[None],
        "labels": torch.cat([labels_of(text) for text in texts()])[None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
    }


def assert_equal_steps(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]]) -> None:
    """float32 sums in another order: a few units in the last place of the largest gradient."""
    assert a[0] == pytest.approx(b[0], rel=2e-6)
    largest = max(gradient.abs().max().item() for gradient in b[1].values())
    for name, gradient in a[1].items():
        torch.testing.assert_close(gradient, b[1][name], rtol=0, atol=5e-6 * largest, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("name", FEW)
def test_padded_packed_and_accumulated_equal_apart(name: str) -> None:
    model, attached = attached_model(name)
    wanted = run(model, *apart())  # four micro-batches
    metrics = attached.metrics()
    for batch in (padded(), packed()):  # one
        model, attached = attached_model(name)
        assert_equal_steps(run(model, batch), wanted)
        assert attached.metrics() == pytest.approx(metrics, rel=5e-6, abs=1e-6)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With several, Transformers' own `batched_mm` sums gradients of experts in an order that varies."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_checkpointing_is_bitwise_the_same_and_counts_once(implementation: str, one_thread: None) -> None:  # noqa: ARG001
    model, attached = attached_model("qwen3_moe", implementation)
    loss, gradients = run(model, padded())
    plain = attached.metrics(per_layer=True)
    model, attached = attached_model("qwen3_moe", implementation)
    model.activation_checkpointing_enable({"use_reentrant": False})
    other, recomputed = run(model, padded())
    assert other == loss
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name
    assert attached.metrics(per_layer=True) == plain


@pytest.mark.parametrize("method", ["sample", "sketch"])
def test_estimators_of_sp_are_the_same_under_checkpointing(method: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = build("qwen3_moe")
        attached = attach(model, {"sp": {"weight": 1.0, "method": method, "sketch_dim": 8, "sample_fraction": 0.5}})
        attached.step = 3
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        found.append(run(model, padded()))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_reentrant_checkpointing_is_refused() -> None:
    model, _ = attached_model("qwen3_moe")
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing would give wrong gradients"):
        run(model, padded())


def test_a_batch_without_labelled_tokens_adds_zero() -> None:
    model, attached = attached_model("qwen3_moe")
    batch = padded()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradients = run(model, batch)
    assert loss == 0.0
    assert not any(gradient.any() for gradient in gradients.values())
    assert attached.metrics()["reg/sp"] == 0.0
