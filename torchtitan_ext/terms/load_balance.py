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
    from torchtitan_ext.ops.routing import accumulate, expert_load, load_shares, mean_weights

    scores = accumulate(scores)
    if weights is None:
        weights = mean_weights(scores, scores.shape[:-1])
    if load is None:
        load = load_shares(expert_load(topk_ids, scores.shape[-1], weights.to(scores.dtype)))
    return scores.shape[-1] * (load.to(scores.dtype).detach() * summed_scores(scores, weights)).sum()


def summed_scores(scores: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over tokens of the scores, normalised to sum to 1: (..., T, E), (..., T) -> (..., E)."""
    from torchtitan_ext.ops.routing import normalize_scores

    return (weights.to(scores.dtype).unsqueeze(-2) @ normalize_scores(scores)).squeeze(-2)


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

        weights = view.tokens.weights
        if self.options.scope == "sequence":
            scores, ids = view.scores_TE.unflatten(0, weights.shape), view.topk_ids_TK.unflatten(0, weights.shape)
            load = all_sum(expert_load(ids, scores.shape[-1], weights), self.ranks.sequence)
            return load_balance_loss(scores, ids, load_shares(load), weights=weights)
        load = load_shares(view.counts_E.to(weights.dtype))
        if view.sums is not None:
            return len(load) * (load * view.sums.shares_E).sum()
        return load_balance_loss(view.scores_TE, view.topk_ids_TK, load, weights=view.weights_T)

    def sums_width(self, experts: int) -> int:
        return experts if self.options.scope == "global" else 0

    def token_sums(self, view: LayerView) -> Tensor:
        """P, the mean score of each expert."""
        return summed_scores(view.scores_TE, view.weights_T) if view.sums is None else view.sums.shares_E

    def total(self, sums_Ln: Tensor, counts_LE: Tensor) -> Tensor:
        from torchtitan_ext.collectives import all_sum
        from torchtitan_ext.ops.routing import load_shares

        load_LE = load_shares(all_sum(counts_LE, self.ranks.data).to(sums_Ln.dtype))
        return counts_LE.shape[1] * (load_LE * sums_Ln).sum()

    def traffic(self, sizes: Sizes) -> Iterable[Line]:
        scope, what = self.options.scope, "lb: assignments per expert"
        if sizes.scope_ranks(scope) == 1:
            return
        if scope == "global":
            layers = sizes.all_moe_layers * sizes.last_stage
            yield Line("all-reduce", what, sizes.steps * layers * sizes.experts * COUNT_BYTES)
        else:
            numbers = sizes.layer_passes * sizes.experts * sizes.sequences
            yield Line("all-reduce", what, numbers * sizes.exact)
