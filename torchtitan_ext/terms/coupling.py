"""cp, cross-layer coupling: the joint top-k routing mass of neighbouring MoE layers (Hu et al., Eq. 7)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torchtitan_ext.terms.base import LayerView, Line, ModelFacts, Sizes, Term, TermOptions, Weight, register

if TYPE_CHECKING:
    from torch import Tensor

    from torchtitan_ext.collectives import Group


def coupling_loss(
    scores: Sequence[Tensor],
    top_k: int,
    source: str = "all",
    topk_ids: Sequence[Tensor] | None = None,
    *,
    weights: Tensor | None = None,
    form: str = "mass",
) -> Tensor:
    """cp: `- sum over layer pairs of mean_i sum_e sum_{v in T_i(l,e)} s^l_ie s^{l+1}_iv`, in closed form.

    scores: L tensors (T, E), normalised by the caller when they are sigmoids. top_k: experts per token. source: "all", e
    runs over all experts; "activated", over topk_ids, L tensors (T, k). `T_i(l,e)` is the same top-k of the later layer
    for every e, so the triple sum is a product of two masses per token; its infimum is -(L-1). O(T*E). "transition": the k
    experts are the same for all tokens, the largest of row e of `S_l^T S_{l+1} / T`; the only reading that depends on which
    expert follows which. form: "mass", as printed; "log" (our variant, not with "transition"), the sum over pairs of the mean
    of minus the logarithm of each token's product of masses, whose gradient does not vanish as 1/E while routing is uniform
    (a product below the dtype's smallest normal number counts as that number and has no gradient).
    Raises ValueError for an unknown source or form. Source: Hu et al., Eq. 7.
    """
    from torchtitan_ext.ops.routing import accumulate, weighted_sum

    if form == "log" and source == "transition":
        raise ValueError("coupling_loss: form='log' takes each token's mass, which source='transition' has not")
    total = accumulate(scores[0]).sum() * 0.0
    for layer in range(len(scores) - 1):
        if source == "transition":
            transitions = transition_matrix(scores[layer], scores[layer + 1], weights)
            total = total + transition_coupling(transitions, top_k)
            continue
        mass = coupling_source_mass(scores[layer], None if topk_ids is None else topk_ids[layer], source)
        total = total + weighted_sum(
            joint_coupling(mass, coupling_target_mass(scores[layer + 1], top_k), form), weights
        )
    return total


def coupling_source_mass(scores: Tensor, topk_ids: Tensor | None, source: str) -> Tensor:
    """cp's factor of the earlier layer: the score mass of the experts that the sum runs over, (T, E) -> (T,)."""
    from torchtitan_ext.ops.routing import accumulate

    if source == "all":
        return accumulate(scores).sum(-1)
    if source == "activated":
        if topk_ids is None:
            raise ValueError("coupling_loss: source='activated' needs topk_ids, the experts chosen in each layer")
        return accumulate(scores).gather(-1, topk_ids).sum(-1)
    raise ValueError(f"coupling_loss: source={source!r} is not one of 'all', 'activated', 'transition'")


def coupling_target_mass(scores: Tensor, top_k: int) -> Tensor:
    """cp's factor of the later layer: the mass of the k largest scores, without the bias: (T, E) -> (T,)."""
    from torchtitan_ext.ops.routing import accumulate, largest_ids

    scores = accumulate(scores)
    return scores.gather(-1, largest_ids(scores.detach(), top_k)).sum(-1)


def joint_coupling(source_mass: Tensor, target_mass: Tensor, form: str = "mass") -> Tensor:
    """cp of each token from its two masses: (T,), (T,) -> (T,). Raises ValueError for an unknown form."""
    import torch

    if form == "mass":
        return -source_mass * target_mass
    if form == "log":
        tiny = torch.finfo(source_mass.dtype).tiny
        return -(source_mass * target_mass).clamp(min=tiny).log()
    raise ValueError(f"coupling_loss: form={form!r} is not one of 'mass', 'log'")


def transition_matrix(earlier: Tensor, later: Tensor, weights: Tensor | None = None) -> Tensor:
    """`C = S_l^T S_{l+1} / T` of one pair of layers, (E, E). earlier, later: scores (T, E). weights: (T,), replace 1/T."""
    from torchtitan_ext.ops.routing import accumulate, mean_weights

    earlier, later = accumulate(earlier), accumulate(later)
    if weights is None:
        weights = mean_weights(earlier, earlier.shape[:1])
    return (earlier * weights.to(earlier.dtype).unsqueeze(1)).t() @ later


def transition_coupling(transitions: Tensor, top_k: int, group: Group | None = None) -> Tensor:
    """cp by transitions: minus the sum of the k largest entries of every row of C; the choice carries no gradient.

    transitions: (..., E, E), C of one or more pairs of layers. group: the ranks that hold the other tokens; the choice is
    made over all of them, in one collective, and their results add up.
    """
    from torchtitan_ext.collectives import all_sum

    chosen = all_sum(transitions.detach(), group).topk(top_k, dim=-1).indices
    return -transitions.gather(-1, chosen).sum()


class CouplingOptions(TermOptions):
    """cp, cross-layer coupling: minus the joint top-k routing mass of neighbouring layers."""

    weight: Weight = 0.0
    """Weight in the objective; the paper uses 1e-3."""
    source: Literal["all", "activated", "transition"] = "all"
    """Experts of the earlier layer that the sum runs over, or expert-to-expert transitions over all tokens."""
    form: Literal["mass", "log"] = "mass"
    """Minus the mass as in the paper, or minus its logarithm, whose gradient does not fade with many experts."""


@register
class Coupling(Term):
    name = "cp"
    title = "cp: coupling of layers"
    Options = CouplingOptions

    @classmethod
    def problems(cls, options: Any, model: ModelFacts) -> Iterable[tuple[str, str]]:
        if model.moe_layers == 1:
            yield "weight", "cp couples neighbouring MoE layers, the model has one"
        if options.form == "log" and options.source == "transition":
            yield "form", "'log' takes each token's mass, which source = 'transition' does not have"

    @classmethod
    def without_effect(cls, options: Any, model: ModelFacts) -> str | None:  # noqa: ARG003 - the interface
        return "every token goes to every expert, so cp's mass is always 1" if model.experts == model.top_k else None

    def carried_width(self, experts: int) -> int:
        return experts if self.options.source == "transition" else 1

    def carried(self, view: LayerView) -> Tensor:
        """The scores (T, E) for source "transition", else the source mass (T, 1)."""
        if self.options.source == "transition":
            return view.scores_TE
        # A copy: FSDP puts its hooks on a block's outputs, and warns about views.
        return coupling_source_mass(view.scores_TE, view.topk_ids_TK, self.options.source).unsqueeze(1).clone()

    def value(self, view: LayerView) -> Tensor:
        from torchtitan_ext.ops.routing import weighted_sum

        assert view.previous is not None
        top_k = self.setting.top_k
        if view.layer == 0:
            return view.previous.sum() * 0.0
        target_T = coupling_target_mass(view.scores_TE, top_k) if view.sums is None else view.sums.largest_mass_T
        return weighted_sum(joint_coupling(view.previous.squeeze(1), target_T, self.options.form), view.weights_T)

    def sums_width(self, experts: int) -> int:
        return experts**2 if self.options.source == "transition" else 0

    def token_sums(self, view: LayerView) -> Tensor:
        """Transitions from the MoE layer before, flat; zeros at the first."""
        assert view.previous is not None
        if view.layer == 0:
            return view.previous.new_zeros(view.scores_TE.shape[1] ** 2)
        return transition_matrix(view.previous, view.scores_TE, view.weights_T).flatten()

    def total(self, sums_Ln: Tensor, counts_LE: Tensor) -> Tensor:
        experts = counts_LE.shape[1]
        pairs_PEE = sums_Ln.unflatten(1, (experts, experts))
        if len(pairs_PEE) > 1:
            pairs_PEE = pairs_PEE[1:]  # of all layers; the first of them has no layer before it
        return transition_coupling(pairs_PEE, self.setting.top_k, self.ranks.data)

    def traffic(self, sizes: Sizes) -> Iterable[Line]:
        s = sizes
        if self.options.source == "transition" and s.token_ranks > 1:
            pairs = s.steps * (s.all_moe_layers - 1) * s.last_stage
            yield Line("all-reduce", "cp: transitions", pairs * s.experts**2 * s.exact)
