"""Parameters and FLOPs of a model, from its shapes alone."""

from typing import NamedTuple

import torch

from titan_moe.config.tables import Model
from titan_moe.model.transformer import Transformer
from torchtitan_ext.terms import Terms


class Counts(NamedTuple):
    total: int
    """Parameters."""
    active: int
    """Parameters that one token uses: all, but only top_k of the routed experts."""
    flops_per_token: int
    """Forward and backward: 6 per active parameter of a matrix product, plus causal attention."""


def meta_model(model: Model, dtype: torch.dtype, terms: Terms | None = None) -> Transformer:
    """The network on the meta device."""
    with torch.device("meta"):
        return Transformer(model, terms or Terms(), dtype)


def count(network: Transformer, seq_len: int) -> Counts:
    """Counts parameters and FLOPs. seq_len: causal attention has a mean context of half of it."""
    moe = network.settings.moe
    total = sum(p.numel() for p in network.parameters())
    routed = sum(p.numel() for layer in network.moe_modules() for p in layer.experts.parameters())
    active = total - routed + routed * moe.top_k // moe.experts
    multiplied = active if network.output is None else active - network.embedding.numel()
    multiplied -= sum(p.numel() for p in network.parameters() if p.dim() == 1)
    attention = sum(block.attention.score_flops(seq_len) for block in network.blocks())
    return Counts(total, active, 6 * multiplied + attention)
