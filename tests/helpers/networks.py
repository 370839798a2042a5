"""A tiny network with all terms, a batch, and a step of it, without a trainer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from titan_moe.config.load import load_config
from titan_moe.config.tables import Config, Model, MoE
from titan_moe.data.loader import Batch
from titan_moe.model.init import init_weights
from titan_moe.model.transformer import Transformer
from titan_moe.train.inputs import to_inputs
from torchtitan_ext.carry import Carry, add_carry
from torchtitan_ext.terms import Setting, build_terms

BATCH, SEQ, VOCAB = 4, 12, 40
WEIGHTS = {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3, "o": 1e-3, "v": 1e-3, "erc": 1e-1}


def settings(**moe: object) -> Model:
    options = {"experts": 6, "top_k": 2, "hidden_dim": 10, **moe}
    return Model(dim=16, layers=3, heads=4, kv_heads=2, qk_norm=True, vocab_size=VOCAB, moe=MoE(**options))


def network(
    dtype: torch.dtype = torch.float64,
    scope: str = "sequence",
    model: Model | None = None,
    seed: int = 0,
    **options: Any,
) -> Transformer:
    """scope: of lb and v. options: of the terms, as `sp_method`."""
    model = model or settings()
    tables: dict[str, dict[str, Any]] = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    for key, value in {"lb_scope": scope, "v_scope": scope, **options}.items():
        name, _, option = key.partition("_")
        tables[name][option] = value
    built = Transformer(model, build_terms(tables, Setting(model.moe.top_k, model.moe.hidden_dim)), dtype)
    init_weights(built, seed)
    return built


def batch(seed: int = 0, masked: bool = True) -> Batch:
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=source)
    mask = torch.ones(BATCH, SEQ, dtype=torch.bool)
    if masked:  # different numbers of labels per sequence, one sequence almost without
        mask[0, 5:] = False
        mask[2, 1:] = False
        mask[3, 7] = False
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    documents = torch.zeros(BATCH, SEQ, dtype=torch.int64)
    sequences = torch.arange(BATCH)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, documents, positions, sequences, int(mask.sum()))


def step(model: Transformer, whole: Batch, micro: int) -> tuple[float, Carry, dict[str, Tensor]]:
    """Loss, carry and gradients of a global batch, `micro` sequences at a time."""
    model.zero_grad()
    loss, carry = 0.0, None
    dtype = torch.promote_types(model.dtype, torch.float32)
    for number, part in enumerate(whole.split(micro)):
        out = model(to_inputs(part, dtype, torch.device("cpu"), fraction=float(number == 0)))
        objective = out.ce + model.terms.objective(out.carry.terms)
        objective.backward()
        loss, carry = loss + objective.item(), add_carry(carry, out.carry)
    assert carry is not None
    return loss, carry, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_step(ours: tuple, theirs: tuple, tolerance: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    torch.testing.assert_close(ours[1].terms, theirs[1].terms, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[1].counts, theirs[1].counts)
    torch.testing.assert_close(ours[1].sums, theirs[1].sums, rtol=10 * tolerance, atol=tolerance)
    for name, grad in ours[2].items():
        difference = (grad - theirs[2][name]).norm() / theirs[2][name].norm()
        assert difference < 10 * tolerance, name


def config_with(**tables: object) -> Config:
    return load_config("debug").model_copy(update=tables)
