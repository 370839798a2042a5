"""z, router z-loss: keeps router logits small (Zoph et al. 2202.08906, Eq. 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchtitan_ext.terms.base import LayerView, Term, TermOptions, Weight, register

if TYPE_CHECKING:
    from torch import Tensor


def router_z_loss(logits: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """z: mean over tokens of the squared log-sum-exp of the router logits, (T, E) -> (). Source: ST-MoE, Eq. 5.

    The square must fit the dtype: logits up to 1e19 in float32."""
    from torchtitan_ext.ops.routing import accumulate, weighted_sum

    return weighted_sum(accumulate(logits).logsumexp(-1).square(), weights)


class RouterZOptions(TermOptions):
    """z, router z-loss (ST-MoE): mean squared log-sum-exp of the router logits."""

    weight: Weight = 0.0
    """Weight in the objective; 1e-3 is customary."""


@register
class RouterZ(Term):
    name = "z"
    title = "router z"
    Options = RouterZOptions

    def value(self, view: LayerView) -> Tensor:
        if view.sums is not None:
            from torchtitan_ext.ops.routing import weighted_sum

            return weighted_sum(view.sums.lse_T.square(), view.weights_T)
        return router_z_loss(view.logits_TE, weights=view.weights_T)
