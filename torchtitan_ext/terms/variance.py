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


def normalized_gates(view: LayerView) -> Tensor:
    """Gate weights that sum to 1 over a token's experts, 0 for all others: (T, E)."""
    from torchtitan_ext.ops.routing import normalize_scores

    normalized_TK = normalize_scores(view.gates_TK)
    return view.scores_TE.new_zeros(view.scores_TE.shape).scatter(1, view.topk_ids_TK, normalized_TK)


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
        from torchtitan_ext.ops.routing import weighted_mean

        weights, scope = view.tokens.weights, self.options.scope
        gates_TE = normalized_gates(view)
        if scope == "sequence":
            gates_TE = gates_TE.unflatten(0, weights.shape)
        else:
            weights = view.weights_T
        mean = None
        if self.options.variant == "paper":
            group = self.ranks.sequence if scope == "sequence" else None
            mean = weighted_mean(gates_TE, weights.to(gates_TE.dtype), group)
        return routing_variance_loss(gates_TE, self.options.variant, mean, weights=weights)

    def sums_width(self, experts: int) -> int:
        return experts + 2 if self.options.scope == "global" and self.options.variant == "paper" else 0

    def token_sums(self, view: LayerView) -> Tensor:
        """Of the gate weights' distances to 1/E: the sum of each expert's, that of all their squares; and the sum of weights.

        Distances, because they are the smaller, the less the gates vary: the difference of squares in `total` then loses no
        digits of a small variance."""
        import torch

        gates_TE = normalized_gates(view)
        distances_TE = gates_TE - 1.0 / gates_TE.shape[1]
        weights_T = view.weights_T.to(gates_TE.dtype)
        squares = (distances_TE.square().sum(1) * weights_T).sum()
        return torch.cat([weights_T @ distances_TE, torch.stack([squares, weights_T.sum()])])

    def total(self, sums_Ln: Tensor, counts_LE: Tensor) -> Tensor:
        """With m the mean over all ranks: the sum over tokens of w (d - m)^2 is `squares - 2 m sum(w d) + m^2 sum(w)`. m has no
        gradient, as in `routing_variance_loss`."""
        import torch

        from torchtitan_ext.collectives import all_sum

        experts = counts_LE.shape[1]
        sums_LE, squares_L1, weight_L1 = sums_Ln.split([experts, 1, 1], 1)
        everywhere = all_sum(torch.cat([sums_LE, weight_L1], 1), self.ranks.data)
        total_L1 = everywhere[:, experts:]
        mean_LE = everywhere[:, :experts] / torch.where(total_L1 > 0, total_L1, 1.0)
        return -(squares_L1.sum() + (mean_LE.square() * weight_L1 - 2.0 * mean_LE * sums_LE).sum()) / experts

    def traffic(self, sizes: Sizes) -> Iterable[Line]:
        scope = self.options.scope
        if self.options.variant == "paper" and sizes.scope_ranks(scope) > 1:
            once = sizes.steps * sizes.all_moe_layers * sizes.last_stage
            means = once if scope == "global" else sizes.layer_passes * sizes.sequences
            numbers = means * (sizes.experts + 1)
            yield Line("all-reduce", "v: mean gates", numbers * sizes.exact)
