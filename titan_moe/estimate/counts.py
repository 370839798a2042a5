"""Parameters and FLOPs of a model, without its weights."""

from typing import NamedTuple

import torch

from titan_moe.config.tables import Model
from titan_moe.model.transformer import Transformer
from torchtitan_ext.terms import Terms


class Counts(NamedTuple):
    total: int
    """Parameters."""
    active: int
    """Parameters that one token meets: all but the experts it is not sent to."""
    flops_per_token: int
    """Of forward and backward: 6 per active parameter in a matrix product, and causal attention."""


def meta_model(model: Model, dtype: torch.dtype, terms: Terms | None = None) -> Transformer:
    """The network without storage."""
    with torch.device("meta"):
        return Transformer(model, terms or Terms(), dtype)


def count(network: Transformer, seq_len: int) -> Counts:
    """seq_len: mean context length of attention is half of it."""
    settings, moe = network.settings, network.settings.moe
    total = sum(p.numel() for p in network.parameters())
    routed = sum(p.numel() for layer in network.moe_modules() for p in layer.experts.parameters())
    active = total - routed + routed * moe.top_k // moe.experts
    multiplied = active if network.output is None else active - network.embedding.numel()
    multiplied -= sum(p.numel() for p in network.parameters() if p.dim() == 1)
    head_dim = settings.head_dim or settings.dim // settings.heads
    attention = 6 * seq_len * settings.layers * settings.heads * head_dim
    return Counts(total, active, 6 * multiplied + attention)
