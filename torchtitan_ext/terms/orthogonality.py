"""o, orthogonality of expert outputs (Guo et al., "Advancing Expert Specialization for Better MoE", Eq. 6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from torchtitan_ext.terms.base import LayerView, MatchedOptions, ModelFacts, Needs, Term, register

if TYPE_CHECKING:
    from torch import Tensor


def orthogonality_loss(
    y: Tensor,
    variant: str = "paper",
    eps: float = 1e-6,
    *,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """o: squared norm of the projections of a token's expert outputs on each other.

    y: (T, k, D) outputs of each token's chosen experts before the gate weight; or (R, D) with rows: (T, k) int64. variant
    "paper": mean over tokens of the sum over ordered pairs of `|| <a,b> / (<b,b> + eps) b ||^2`. variant "code": mean over
    tokens and chosen experts of the squared norm of the projection on the span of the other chosen experts' outputs.
    The value itself is a squared length, so lengths must be below 1e19 in float32; those below sqrt(eps) count less, as the
    formula says. Raises ValueError for an unknown variant. Source: Guo et al., Eq. 6, and their published code.
    """
    from torchtitan_ext.ops.routing import weighted_sum

    return weighted_sum(token_orthogonality(y, variant, eps, rows=rows), weights)


def token_orthogonality(y: Tensor, variant: str = "paper", eps: float = 1e-6, *, rows: Tensor | None = None) -> Tensor:
    """What `orthogonality_loss` averages: one number per token, (T,)."""
    from torchtitan_ext.ops.gram import token_gram, token_rows

    rows, y = token_rows(y, rows)
    return orthogonality_of_gram(token_gram(y, rows), variant, eps)


def orthogonality_of_gram(gram: Tensor, variant: str = "paper", eps: float = 1e-6) -> Tensor:
    """The same from the inner products (T, k, k) of each token's outputs, unscaled."""
    from torchtitan_ext.ops.gram import squared_projections, squared_span_projections

    if variant == "paper":
        return squared_projections(gram, eps)
    if variant == "code":
        return squared_span_projections(gram)
    raise ValueError(f"orthogonality_loss: variant={variant!r} is not one of 'paper', 'code'")


class OrthogonalityOptions(MatchedOptions):
    """o, orthogonality of expert outputs (Guo et al.)."""

    variant: Literal["paper", "code"] = "paper"
    """The paper's pairwise projections, or its published code's projection on the span of the others."""


@register
class Orthogonality(Term):
    name = "o"
    title = "orthogonality"
    Options = OrthogonalityOptions
    needs = Needs(outputs=True)

    @classmethod
    def problems(cls, options: Any, model: ModelFacts) -> Iterable[tuple[str, str]]:  # noqa: ARG003 - the interface
        if model.top_k == 1:
            yield "weight", "o compares the experts of a token, and model.moe.top_k = 1; set the weight to 0"

    def per_token(self, view: LayerView, observed: Any) -> Any:  # noqa: ARG002 - o observes outputs, not activations
        assert view.y_RD is not None
        y_RD = view.y_RD if self.weighted else view.y_RD.detach()
        return token_orthogonality(y_RD, self.options.variant, rows=view.rows_TK)

    def value(self, view: LayerView) -> Tensor:
        if (
            view.observed is not None
        ):  # (T,), `per_token` or `orthogonality_of_gram`, where a model returns no single outputs
            from torchtitan_ext.ops.routing import weighted_sum

            return weighted_sum(view.observed, view.weights_T)
        assert view.y_RD is not None
        return orthogonality_loss(view.y_RD, self.options.variant, rows=view.rows_TK, weights=view.weights_T)
