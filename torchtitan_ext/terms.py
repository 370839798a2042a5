"""The enabled regularizers of a run, and how one MoE layer adds its share of them to the carry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_ext.carry import Carry
from torchtitan_ext.gram import squared_cosines, token_gram
from torchtitan_ext.losses import (
    coupling_source_mass,
    coupling_target_mass,
    load_balance_loss,
    router_z_loss,
    weighted_sum,
)
from torchtitan_ext.metrics import token_entropy


class LayerView(NamedTuple):
    """What a regularizer sees of one MoE layer. T tokens, E experts, K chosen, R routed rows, F expert hidden width."""

    logits_TE: Tensor
    """Router logits, float32."""
    scores_TE: Tensor
    """Routing scores, normalised to sum to 1."""
    topk_ids_TK: Tensor
    """The chosen experts, bias included."""
    gates_TK: Tensor
    """Gate weights of the chosen experts."""
    z_RF: Tensor
    """SwiGLU activations, sorted by expert."""
    rows_TK: Tensor
    """Row of `z_RF` that holds token i's a-th expert."""

    def detach(self) -> "LayerView":
        return LayerView(*(tensor.detach() for tensor in self))


@dataclass(frozen=True)
class Terms:
    """Which terms a run has, in the order of `Carry.terms`, and their options."""

    weights: Mapping[str, float]
    """Weight in the objective of every enabled term; 0 for a term that is only measured."""
    top_k: int
    lb_scope: str = "global"
    cp_source: str = "all"
    custom: Mapping[str, Callable[[LayerView], Tensor]] = field(default_factory=dict)
    """Terms beside the built-in ones: a value per token."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def objective(self, terms: Tensor) -> Tensor:
        """The weighted sum of `Carry.terms`, to be added to the cross-entropy."""
        return terms @ terms.new_tensor(list(self.weights.values()))

    def add(self, view: LayerView, carry: Carry, layer: int, token_weights: Tensor) -> Carry:
        """The carry with this layer's terms and measures added.

        layer: index among the MoE layers, from 0. token_weights: (B, S), 1 / (labelled tokens of the global batch) on
        labelled tokens and 0 elsewhere.
        """
        weights_T = token_weights.flatten().to(carry.terms.dtype)
        counts_E = _labelled_counts(view.topk_ids_TK, view.scores_TE.shape[-1], weights_T)
        detached = view.detach()
        pairs = None  # squared cosines per token, shared by sp and the measure of overlap
        values = []
        for name, weight in self.weights.items():
            seen = view if weight > 0 else detached
            if name == "lb":
                value = self._load_balance(seen, counts_E, token_weights)
            elif name == "z":
                value = router_z_loss(seen.logits_TE, weights=weights_T)
            elif name == "sp":
                pairs = squared_cosines(token_gram(seen.z_RF, seen.rows_TK))
                value = weighted_sum(pairs, weights_T)
            elif name == "cp":
                value = self._coupling(
                    seen, carry.previous if weight > 0 else carry.previous.detach(), layer, weights_T
                )
            else:
                value = weighted_sum(self.custom[name](seen).to(carry.terms.dtype), weights_T)
            values.append(value.to(carry.terms.dtype))
        terms = carry.terms + torch.stack(values) if values else carry.terms
        previous = carry.previous
        if "cp" in self.weights:
            previous = coupling_source_mass(view.scores_TE, view.topk_ids_TK, self.cp_source)
        with torch.no_grad():
            measures = self._measures(detached, pairs, weights_T)
            counts = torch.select_scatter(carry.counts, counts_E, 0, layer)
            sums = torch.select_scatter(carry.sums, measures.to(carry.sums.dtype), 0, layer)
        return Carry(terms, previous, counts, sums)

    def _load_balance(self, view: LayerView, counts_E: Tensor, token_weights: Tensor) -> Tensor:
        batch, seq = token_weights.shape
        if self.lb_scope == "sequence":
            return load_balance_loss(
                view.scores_TE.unflatten(0, (batch, seq)),
                view.topk_ids_TK.unflatten(0, (batch, seq)),
                weights=token_weights,
            )
        # One process holds the whole micro-step, so "global" and "microbatch" take the same counts.
        load = counts_E.to(token_weights.dtype) / counts_E.sum().clamp(min=1)
        return load_balance_loss(view.scores_TE, view.topk_ids_TK, load, weights=token_weights.flatten())

    def _coupling(self, view: LayerView, previous_T: Tensor, layer: int, weights_T: Tensor) -> Tensor:
        if layer == 0:
            return previous_T.sum() * 0.0
        return -weighted_sum(previous_T * coupling_target_mass(view.scores_TE, self.top_k), weights_T)

    def _measures(self, view: LayerView, pairs_T: Tensor | None, weights_T: Tensor) -> Tensor:
        k = view.topk_ids_TK.shape[1]
        mass_T = view.scores_TE.gather(1, view.topk_ids_TK).sum(1)
        overlap = (
            weights_T.new_zeros(()) if pairs_T is None or k == 1 else weighted_sum(pairs_T, weights_T) / (k * (k - 1))
        )
        return torch.stack(
            [weighted_sum(token_entropy(view.scores_TE), weights_T), weighted_sum(mass_T, weights_T), overlap.detach()]
        )


def _labelled_counts(topk_ids_TK: Tensor, experts: int, weights_T: Tensor) -> Tensor:
    """Assignments per expert of the tokens that carry a label: (E,) int64."""
    labelled = (weights_T > 0).to(torch.int64).unsqueeze(1).expand_as(topk_ids_TK)
    counts = torch.zeros(experts, dtype=torch.int64, device=topk_ids_TK.device)
    return counts.scatter_add(0, topk_ids_TK.flatten(), labelled.flatten())


def enabled_terms(weights: Mapping[str, float], measure: Sequence[str]) -> dict[str, float]:
    """The terms that must be computed: those with a weight, and those to be measured at weight 0."""
    return {name: weight for name, weight in weights.items() if weight > 0 or name in measure} | {
        name: 0.0 for name in measure if name not in weights
    }
