"""lb and the router z-loss against their definitions written as plain loops, values and gradients, in float64."""

import pytest
import torch

from tests.helpers import reference
from tests.helpers.losses import EXPERTS, KS, TOKENS, assert_same, generator, routing
from torchtitan_ext.losses import (
    load_balance_loss,
    router_z_loss,
)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_load_balance_equals_its_definition(k: int, score: str) -> None:
    _, (scores,), (ids,) = routing(k, score=score)
    assert_same(lambda s: load_balance_loss(s, ids), lambda s: reference.load_balance(s, ids), scores)


def test_load_balance_normalises_sigmoid_scores() -> None:
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


def test_a_given_load_replaces_that_of_the_tokens() -> None:
    _, (scores,), (ids,) = routing(2)
    load = torch.rand(EXPERTS, dtype=torch.float64, generator=generator(3))
    wanted = EXPERTS * (load * scores.mean(0)).sum()
    torch.testing.assert_close(load_balance_loss(scores, ids, load), wanted, rtol=1e-12, atol=0)


def test_router_z_equals_its_definition() -> None:
    (logits,), _, _ = routing(2)
    assert_same(router_z_loss, reference.z_loss, logits.requires_grad_())
