"""v, variance of the gate weights (Guo et al., "Advancing Expert Specialization for Better MoE", Eq. 7)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from torchtitan_ext.terms.base import LayerView, Line, MatchedOptions, ModelFacts, Sizes, Term, register

if TYPE_CHECKING:
    from torch import Tensor


def routing_variance_loss(
    gates: Tensor, variant: str = "paper", mean: Tensor | None = None, *, weights: Tensor | None = None
) -> Tensor:
    """v: minus the variance of the gate weights.

    gates: (T, E), normalised by the caller to sum to 1 over the chosen experts, 0 elsewhere; a leading dimension (B, S, E)
    forms the means per sequence. variant "paper": over tokens, `- mean_i (1/E) sum_e (g_ie - mean_i g_ie)^2`. mean: (E,)
    computed elsewhere (over all ranks). variant "code": over experts, minus the mean over tokens of the unbiased variance of
    the E weights (0 for one expert). Deviations whose squares underflow (below 1e-19 in float32) count as 0. Raises
    ValueError for an unknown variant. Source: Guo et al., Eq. 7, and their published code.
    """
    from torchtitan_ext.ops.routing import accumulate, mean_weights, weighted_mean

    gates = accumulate(gates)
    if weights is None:
        weights = mean_weights(gates, gates.shape[:-1])
    weights = weights.to(gates.dtype)
    experts = gates.shape[-1]
    if variant == "paper":
        if mean is None:
            mean = weighted_mean(gates, weights, None)
        # The gradient through the mean is 0, since deviations from it sum to 0.
        deviations = gates - mean.detach().to(gates.dtype).unsqueeze(-2)
        return -(deviations.square().mean(-1) * weights).sum()
    if variant == "code":
        deviations = gates - gates.mean(-1, keepdim=True)
        return -(deviations.square().sum(-1) * weights).sum() / max(experts - 1, 1)
    raise ValueError(f"routing_variance_loss: variant={variant!r} is not one of 'paper', 'code'")


class RoutingVarianceOptions(MatchedOptions):
    """v, variance of the gate weights (Guo et al.)."""

    variant: Literal["paper", "code"] = "paper"
    """Variance over tokens as in the paper, or over experts as in its published code."""
    scope: Literal["global", "sequence", "microbatch"] = "sequence"
    """Tokens over which both means are taken."""


@register
class RoutingVariance(Term):
    name = "v"
    title = "routing variance"
    Options = RoutingVarianceOptions

    @classmethod
    def problems(cls, options: Any, model: ModelFacts) -> Iterable[tuple[str, str]]:  # noqa: ARG003 - the interface
        if model.experts == 1:
            yield "weight", "v compares experts, and model.moe.experts = 1"

    @classmethod
    def without_effect(cls, options: Any, model: ModelFacts) -> str | None:  # noqa: ARG003 - the interface
        return "v divides gates by their sum, which makes a single gate always 1" if model.top_k == 1 else None

    def value(self, view: LayerView) -> Tensor:
        from torchtitan_ext.ops.routing import normalize_scores, weighted_mean

        weights, scope, ranks = view.tokens.weights, self.options.scope, self.ranks
        normalized_TK = normalize_scores(view.gates_TK)
        gates_TE = view.scores_TE.new_zeros(view.scores_TE.shape).scatter(1, view.topk_ids_TK, normalized_TK)
        if scope == "sequence":
            gates_TE = gates_TE.unflatten(0, weights.shape)
        else:
            weights = view.weights_T
        group = {"sequence": ranks.sequence, "global": ranks.data, "microbatch": None}[scope]
        mean = None
        if self.options.variant == "paper":
            mean = weighted_mean(gates_TE, weights.to(gates_TE.dtype), group)
        return routing_variance_loss(gates_TE, self.options.variant, mean, weights=weights)

    def traffic(self, sizes: Sizes) -> Iterable[Line]:
        scope = self.options.scope
        if self.options.variant == "paper" and sizes.scope_ranks(scope) > 1:
            means = 1 if scope == "global" else sizes.sequences
            numbers = sizes.layer_passes * means * (sizes.experts + 1)
            yield Line("all-reduce", "v: mean gates", numbers * sizes.exact)
