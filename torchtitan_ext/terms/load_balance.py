"""lb, load balance: the auxiliary loss of Switch Transformer (Fedus et al. 2101.03961, Eqs. 4-6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from torchtitan_ext.terms.base import (
    COUNT_BYTES,
    LayerView,
    Line,
    ModelFacts,
    Sizes,
    Term,
    TermOptions,
    Weight,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


def load_balance_loss(
    scores: Tensor, topk_ids: Tensor, load: Tensor | None = None, *, weights: Tensor | None = None
) -> Tensor:
    """lb: `E * sum_e f_e P_e`, f the fraction of assignments (no gradient), P the mean normalised score. 1 when balanced.

    scores: (T, E), normalised to sum to 1 here when they are sigmoids (rows that underflow: `routing.normalize_scores`).
    topk_ids: (T, k), the real choice, bias included. load: (E,) fractions f computed elsewhere (over all ranks, say).
    weights: (T,). A leading dimension, (B, S, E) and (B, S, k), forms f and P per sequence and averages over sequences.
    Source: Switch Transformer, Eqs. 4-6.
    """
    from torchtitan_ext.ops.routing import accumulate, expert_load, load_shares, mean_weights, normalize_scores

    scores = normalize_scores(accumulate(scores))
    if weights is None:
        weights = mean_weights(scores, scores.shape[:-1])
    weights = weights.to(scores.dtype)
    if load is None:
        load = load_shares(expert_load(topk_ids, scores.shape[-1], weights))
    mean_scores = (weights.unsqueeze(-2) @ scores).squeeze(-2)
    return scores.shape[-1] * (load.to(scores.dtype).detach() * mean_scores).sum()


class LoadBalanceOptions(TermOptions):
    """lb, Switch/GShard load balance: E * sum_e f_e P_e."""

    weight: Weight = 0.01
    """Weight in the objective."""
    scope: Literal["global", "sequence", "microbatch"] = "global"
    """Tokens over which load and mean score are taken: all of the micro-step, each sequence, or this rank's."""


@register
class LoadBalance(Term):
    name = "lb"
    title = "load balance"
    Options = LoadBalanceOptions

    @classmethod
    def without_effect(cls, options: Any, model: ModelFacts) -> str | None:  # noqa: ARG003 - the interface
        return "every token goes to every expert, so lb is always 1" if model.experts == model.top_k else None

    def value(self, view: LayerView) -> Tensor:
        from torchtitan_ext.collectives import all_sum
        from torchtitan_ext.ops.routing import expert_load, load_shares

        weights, scope = view.tokens.weights, self.options.scope
        if scope == "sequence":
            scores, ids = view.scores_TE.unflatten(0, weights.shape), view.topk_ids_TK.unflatten(0, weights.shape)
            load = all_sum(expert_load(ids, scores.shape[-1], weights), self.ranks.sequence)
            return load_balance_loss(scores, ids, load_shares(load), weights=weights)
        counts_E = view.counts_E if scope == "microbatch" else all_sum(view.counts_E, self.ranks.data)
        load = load_shares(counts_E.to(weights.dtype))
        if view.sums is not None:
            return len(load) * (load * view.sums.shares_E).sum()
        return load_balance_loss(view.scores_TE, view.topk_ids_TK, load, weights=view.weights_T)

    def traffic(self, sizes: Sizes) -> Iterable[Line]:
        scope = self.options.scope
        if sizes.scope_ranks(scope) > 1:
            numbers = COUNT_BYTES if scope == "global" else sizes.sequences * sizes.exact
            yield Line("all-reduce", "lb: assignments per expert", sizes.layer_passes * sizes.experts * numbers)
