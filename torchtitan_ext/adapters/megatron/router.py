"""Megatron's top-k router with the losses that are functions of its scores: cp, lb and v."""

# mypy: disable-error-code="import-untyped,import-not-found"

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn import functional

from torchtitan_ext.adapters.megatron.configuration import Coefficients, term_options
from torchtitan_ext.adapters.megatron.neighbours import Neighbours
from torchtitan_ext.adapters.megatron.objective import (
    TokenWeights,
    acts,
    attach,
    group_or_none,
    log_value,
    token_weights,
)
from torchtitan_ext.collectives import Ranks
from torchtitan_ext.ops.routing import accumulate, labelled_counts, normalize_scores
from torchtitan_ext.terms import LayerView, Setting, Tokens, build_terms

NAMES = ("cp", "lb", "v")
"""Terms that need nothing but a router's outputs."""


class SpecializedRouter(TopKRouter):
    """A TopKRouter that adds cp, lb and v to the objective. Its forward results and its parameters are TopKRouter's."""

    def __init__(self, config: Any, pg_collection: Any = None, *, neighbours: Neighbours, **further: Any) -> None:
        """neighbours: shared by the routers of a model, for what cp takes from one layer to the next."""
        if not isinstance(config, Coefficients):
            raise ValueError(
                f"{type(config).__name__} has no coefficients of losses: make the configuration with SpecializedConfig or "
                "specialized_config of torchtitan_ext.adapters.megatron"
            )
        super().__init__(config=config, pg_collection=pg_collection, **further)
        options = term_options(config)
        ranks = Ranks(data=group_or_none(self.tp_dp_cp_group), sequence=group_or_none(self.tp_cp_group))
        chosen = {name: options[name] for name in NAMES if name in options}
        self.terms = build_terms(chosen, Setting(top_k=self.topk, ranks=ranks)).terms
        self.neighbours = neighbours

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        self.neighbours.add(layer_number)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **further: Any) -> tuple[Tensor, Tensor]:
        """Megatron's (probs, routing map), both (T, E), with the losses attached to probs.

        logits: (S, B, E). padding_mask: (S, B), True where a token counts in no loss."""
        probs, routing_map = super().routing(logits, padding_mask=padding_mask, **further)
        if not self.terms or not acts(self):
            return probs, routing_map
        weights = token_weights(self, routing_map.shape[0], padding_mask, logits.device)
        view = self._view(logits, probs, routing_map, weights)
        total = view.weights_T.new_zeros(())
        for term in self.terms:
            if term.name == "cp":
                view = view._replace(previous=self._previous(term, view))
                if view.previous is None:
                    continue
            value = term.at_layer(view)
            log_value(term.name, value, self)
            total = total + term.options.weight * value
        return attach(probs, total, weights, self.config), routing_map

    def _view(self, logits: Tensor, probs: Tensor, routing_map: Tensor, weights: TokenWeights) -> LayerView:
        """What the terms see. Their order of tokens is (B, S)."""
        sequence, batch = logits.shape[:2]

        def ordered(x: Tensor) -> Tensor:
            return x.view(sequence, batch, *x.shape[1:]).transpose(0, 1).flatten(0, 1)

        logits_TE = accumulate(ordered(logits.flatten(0, 1)))
        ids_TK = chosen_experts(ordered(routing_map), self.topk)
        weights_T = ordered(weights.weights_T)
        none = weights_T.new_empty(0)  # keys of random draws and rows of activations, which these terms do not use
        return LayerView(
            layer=0 if self.neighbours.is_first(self.layer_number, self.config) else 1,
            tokens=Tokens(weights_T.view(batch, sequence), none, none, none),
            logits_TE=logits_TE,
            scores_TE=scores_of(logits_TE, self.score_function),
            topk_ids_TK=ids_TK,
            gates_TK=accumulate(ordered(probs).gather(1, ids_TK)),
            rows_TK=none,
            weights_T=weights_T,
            counts_E=labelled_counts(ids_TK, routing_map.shape[1], weights_T),
        )

    def _previous(self, term: Any, view: LayerView) -> Tensor | None:
        """What cp takes from the MoE layer before; None at the first one, where cp has no value.

        With source "all" that is the sum of all scores, which is 1 whatever the logits: no neighbour is asked, so it works
        across pipeline stages and in any order of recomputation."""
        if term.options.source == "all":
            return None if view.layer == 0 else torch.ones_like(view.weights_T).unsqueeze(1)
        previous = None if view.layer == 0 else self.neighbours.take(self.layer_number)
        if not self.neighbours.is_last(self.layer_number):
            self.neighbours.leave(self.layer_number, term.carried(view))
        return previous


def chosen_experts(routing_map: Tensor, top_k: int) -> Tensor:
    """The experts of each token, in any order: (T, E) of which k are true -> (T, k) int64. The host does not wait."""
    return routing_map.to(torch.uint8).topk(top_k, dim=1).indices


def scores_of(logits: Tensor, function: str) -> Tensor:
    """Routing scores that sum to 1, as Megatron defines them for its auxiliary losses: (T, E) -> (T, E)."""
    if function == "softmax":
        return logits.softmax(-1)
    if function == "sigmoid":
        return normalize_scores(logits.sigmoid(), functional.logsigmoid(logits))
    if function == "sqrtsoftplus":  # since 0.18
        return normalize_scores(functional.softplus(logits).sqrt())
    raise ValueError(f"moe_router_score_function = {function!r} is not one of 'softmax', 'sigmoid', 'sqrtsoftplus'")
