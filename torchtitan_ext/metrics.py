"""Measures of routing and specialization; none carries a gradient."""

import torch
from torch import Tensor


@torch.no_grad()
def max_vio(counts: Tensor) -> Tensor:
    """`max_e c_e / mean(c) - 1` of the assignment counts (..., E): 0 when balanced; 0 for no token at all."""
    counts = counts.to(torch.float64)
    mean = counts.mean(-1)
    return torch.where(mean > 0, counts.amax(-1) / torch.where(mean > 0, mean, 1.0) - 1.0, 0.0)


@torch.no_grad()
def dead_share(counts: Tensor) -> Tensor:
    """Share of experts without a token: counts (..., E) -> (...)."""
    return (counts == 0).to(torch.float64).mean(-1)


def token_entropy(scores: Tensor) -> Tensor:
    """`-sum_e s_e log s_e` in nats per token; scores (T, E) that sum to 1 -> (T,)."""
    return torch.special.entr(scores).sum(-1)


@torch.no_grad()
def routing_entropy(scores: Tensor) -> Tensor:
    """Mean over tokens of the entropy of the routing scores (T, E), normalised first, in nats."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return token_entropy(scores / scores.sum(-1, keepdim=True)).mean()


@torch.no_grad()
def conditional_routing(earlier_ids: Tensor, later_ids: Tensor, experts: int, mask: Tensor | None = None) -> Tensor:
    """cond[e, v]: P(v chosen in the later layer given e chosen in the earlier one).

    Both ids: (T, k). mask: (T,) tokens that count. Returns (E, E) float64 whose rows sum to k (0 for an unused expert).
    """
    if mask is not None:
        earlier_ids, later_ids = earlier_ids[mask], later_ids[mask]
    pairs = earlier_ids.unsqueeze(2) * experts + later_ids.unsqueeze(1)
    joint = torch.bincount(pairs.flatten(), minlength=experts * experts).reshape(experts, experts).to(torch.float64)
    used = torch.bincount(earlier_ids.flatten(), minlength=experts).to(torch.float64)
    return joint / used.clamp(min=1).unsqueeze(1)
