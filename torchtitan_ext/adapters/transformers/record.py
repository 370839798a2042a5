"""What one forward pass leaves behind: per MoE layer the router's logits, the choice, and a few numbers per token.

Activations and outputs never leave their layer. So with activation checkpointing they are freed, and computed again in the
backward; then the observers run the same operations and record nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtitan_ext.adapters.transformers.structure import MoELayer
from torchtitan_ext.ops.response import coupling_matrix
from torchtitan_ext.ops.routing import accumulate, labelled_counts, normalize_scores
from torchtitan_ext.terms import LayerView, Terms, Tokens
from torchtitan_ext.terms.base import Probes


class Seen(NamedTuple):
    """What is kept of one MoE layer."""

    logits_TE: Tensor
    topk_ids_TK: Tensor
    gates_TK: Tensor
    observed: dict[str, Any]
    """By term name, what `Term.per_token` returned."""
    responses: Probes | None
    """The experts' responses (P, E) to the probes, in place of the probes."""


class Record:
    """One forward pass of an attached model."""

    def __init__(self, layers: int, gradients: bool) -> None:
        """gradients: whether autograd records the pass."""
        self.layers: list[Seen | None] = [None] * layers
        self.gradients = gradients
        self.open = True

    def complete(self) -> list[Seen]:
        """What every layer left. Raises RuntimeError for one that did not run."""
        seen = [one for one in self.layers if one is not None]
        if len(seen) < len(self.layers):
            raise RuntimeError(
                f"attach: MoE layer {self.layers.index(None)} did not run through its experts function in this forward pass"
            )
        return seen


class RowsOfTokens(NamedTuple):
    """Access of terms to rows at the experts, which are all on this rank: torchtitan_ext's `ExpertRows`."""

    local: bool
    """False for copies of the rows, which a term must not give back."""
    rows_TK: Tensor

    def home(self, x_RX: Tensor) -> Tensor:
        return x_RX

    def home_subset(self, x_RX: Tensor, rows_NK: Tensor) -> tuple[Tensor, Tensor]:
        return x_RX, rows_NK

    def to_experts(self, keys_T: Tensor) -> Tensor:
        tokens, k = self.rows_TK.shape
        keys_R = keys_T.new_empty(tokens * k)
        return keys_R.scatter_(0, self.rows_TK.flatten(), keys_T.repeat_interleave(k))

    def sum_hidden(self, x: Tensor) -> Tensor:
        return x

    def first_hidden(self, width: int) -> int:  # noqa: ARG002 - the interface
        return 0


class LayerObserver:
    """Sees one call of the experts of one layer, and reduces activations and outputs to what terms need per token."""

    def __init__(self, terms: Terms, view: LayerView, record: Record | None, responses: Probes | None) -> None:
        """view: with token weights of 1. record: None in a recomputation."""
        self.terms, self.view, self.record, self.responses = terms, view, record, responses
        self.outputs = terms.needs.outputs
        self.observed: dict[str, Any] = {}

    def activations(self, z_RF: Tensor, rows_TK: Tensor, local: bool) -> Tensor:
        self.view = self.view._replace(rows_TK=rows_TK)
        z_RF, self.observed = self.terms.observe(z_RF, self.view, RowsOfTokens(local, rows_TK))
        if self.terms.needs.activations:
            self.view = self.view._replace(z_RF=z_RF)
        return z_RF

    def expert_outputs(self, y_RD: Tensor, rows_TK: Tensor) -> None:
        self.view = self.view._replace(y_RD=y_RD, rows_TK=rows_TK)

    def end(self) -> None:
        view = self.view
        observed = {term.name: term.per_token(view, self.observed.get(term.name)) for term in self.terms.terms}
        if self.record is not None:
            self.record.layers[view.layer] = Seen(
                view.logits_TE, view.topk_ids_TK, view.gates_TK, observed, self.responses
            )


def probe_responses(
    terms: Terms, layer: MoELayer, number: int, router_weight_ED: Tensor, tokens: Tokens
) -> Probes | None:
    """The norms of every expert's gate projection of the terms' probes, (P, E), and how many belong to each term."""
    probes = terms.probes(router_weight_ED, number, tokens)
    if probes is None:
        return None
    return Probes(coupling_matrix(probes.vectors_PD, layer.gate_weight), probes.counts)


def scores_of(logits_TE: Tensor, score: str) -> Tensor:
    """Routing scores, normalised to sum to 1, in at least float32."""
    logits_TE = accumulate(logits_TE)
    if score == "softmax":
        return logits_TE.softmax(-1)
    return normalize_scores(logits_TE.sigmoid(), torch.nn.functional.logsigmoid(logits_TE))


def layer_view(seen: Seen, layer: int, score: str, tokens: Tokens) -> LayerView:
    """What terms see of a layer. tokens: of all T, in the order of the layer's."""
    logits_TE, weights_T = accumulate(seen.logits_TE), tokens.weights.flatten()
    return LayerView(
        layer,
        tokens,
        logits_TE=logits_TE,
        scores_TE=scores_of(logits_TE, score),
        topk_ids_TK=seen.topk_ids_TK,
        gates_TK=accumulate(seen.gates_TK),
        rows_TK=seen.topk_ids_TK,  # rows of activations, of which there are none
        weights_T=weights_T,
        counts_E=labelled_counts(seen.topk_ids_TK, logits_TE.shape[1], weights_T),
        responses_PE=None if seen.responses is None else seen.responses.vectors_PD,
    )


def proportional(seen: Seen, score: str) -> bool:
    """Whether the gate weights of every token are the scores of its experts up to a factor: else the score function is
    another one."""
    logits_TK = accumulate(seen.logits_TE).detach().double().gather(1, seen.topk_ids_TK)
    gates_TK = seen.gates_TK.detach().double()
    log_scores_TK = logits_TK if score == "softmax" else torch.nn.functional.logsigmoid(logits_TK)
    kept = gates_TK.abs() > gates_TK.abs().amax(1, keepdim=True) * 1e-3  # the others lose digits
    ratio_TK = torch.where(kept, gates_TK.abs().log() - log_scores_TK, torch.nan)
    spread_T = torch.nan_to_num(ratio_TK, nan=-torch.inf).amax(1) - torch.nan_to_num(ratio_TK, nan=torch.inf).amin(1)
    tolerance = max(8 * torch.finfo(seen.gates_TK.dtype).eps, 1e-3)
    # Rounded logits, as of a router in bfloat16, are exact here, since the gates come from the same ones.
    return bool((spread_T[spread_T.isfinite()] < tolerance).all())
