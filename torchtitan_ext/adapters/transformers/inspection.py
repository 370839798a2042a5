"""The measures of `titan-moe inspect` for a model of Transformers, in the form that `titan-moe report` reads.

L MoE layers, E experts, K chosen experts, T tokens of a batch. Definitions: docs/metrics.md. Clusters of router inputs and
examples of text are not among them.
"""

from typing import Any

import torch
from torch import Tensor

from torchtitan_ext.adapters.transformers.structure import MoELayer
from torchtitan_ext.metrics import (
    dead_fraction,
    expert_response,
    load_variation,
    margins,
    match_experts,
    max_vio,
    mean_gate_imbalance,
    token_entropy,
)
from torchtitan_ext.ops.gram import squared_cosines, token_gram
from torchtitan_ext.ops.response import coupling_noise_bound
from torchtitan_ext.ops.routing import normalize_scores
from torchtitan_ext.terms import LayerView, Needs, Setting, Term, TermOptions
from torchtitan_ext.terms.specialization import chance_overlap

PER_TOKEN = ("entropy", "topk_mass", "margin", "overlap", "overlap_y", "squared_gates")


class Measures(Term):
    """A term of value 0 that adds up what it sees of labelled tokens."""

    name = "inspect"
    needs = Needs(activations=True, outputs=True)

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        super().__init__(TermOptions(), Setting(top_k=top_k))
        self.sums = torch.zeros(layers, len(PER_TOKEN), dtype=torch.float64)
        self.gates = torch.zeros(layers, experts, dtype=torch.float64)
        self.counts = torch.zeros(layers, experts, dtype=torch.int64)
        self.joint = torch.zeros(layers - 1, experts, experts, dtype=torch.int64)
        self.first_joint = torch.zeros_like(self.joint)
        self.before: tuple[Tensor, Tensor] | None = None
        """Chosen experts and gates of the layer before."""

    @torch.no_grad()
    def per_token(self, view: LayerView, observed: Any) -> Any:  # noqa: ARG002 - the interface
        assert view.z_RF is not None
        assert view.y_RD is not None
        grams = (token_gram(rows, view.rows_TK, scaled=True) for rows in (view.z_RF, view.y_RD))
        pairs = max(self.setting.top_k * (self.setting.top_k - 1), 1)
        return torch.stack([squared_cosines(gram) / pairs for gram in grams])

    @torch.no_grad()
    def value(self, view: LayerView) -> Tensor:
        layer, labelled_T = view.layer, view.weights_T > 0
        ids_TK, scores_TE = view.topk_ids_TK, view.scores_TE
        gates_TK = normalize_scores(view.gates_TK)
        overlaps = view.observed
        columns = (
            token_entropy(scores_TE),
            scores_TE.gather(1, ids_TK).sum(1),
            margins(scores_TE, ids_TK.shape[1]),
            overlaps[0],
            overlaps[1],
            gates_TK.square().sum(1),
        )
        self.sums[layer] += torch.stack([column.double() for column in columns])[:, labelled_T].sum(1).cpu()
        chosen, gates = ids_TK[labelled_T].cpu(), gates_TK[labelled_T].cpu()
        self.gates[layer].scatter_add_(0, chosen.flatten(), gates.flatten().double())
        experts = self.counts.shape[1]
        self.counts[layer] += torch.bincount(chosen.flatten(), minlength=experts)
        if layer:
            assert self.before is not None
            both = self.before[0].unsqueeze(2) * experts + chosen.unsqueeze(1)
            first = first_choice(*self.before) * experts + first_choice(chosen, gates)
            for sums, pairs in ((self.joint, both), (self.first_joint, first)):
                sums[layer - 1] += torch.bincount(pairs.flatten(), minlength=experts**2).view(experts, experts)
        self.before = chosen, gates
        return view.weights_T.new_zeros(())

    def result(
        self, layers: tuple[MoELayer, ...], hidden_dim: int, step: int, losses: dict[str, float]
    ) -> dict[str, Any]:
        """All measures by layer, by pair of consecutive layers, and their means."""
        by_layer = [self._layer(number, layer, hidden_dim) for number, layer in enumerate(layers)]
        pairs = [self._pair(number) for number in range(len(layers) - 1)]
        return {
            "step": step,
            **losses,
            "domains": ["none"],
            "summary": means(by_layer) | means(pairs),
            "layers": by_layer,
            "pairs": pairs,
        }

    def _layer(self, number: int, layer: MoELayer, hidden_dim: int) -> dict[str, Any]:
        counts, experts = self.counts[number], self.counts.shape[1]
        tokens = max(int(counts.sum()) // self.setting.top_k, 1)
        sums = dict(zip(PER_TOKEN, (self.sums[number] / tokens).tolist(), strict=True))
        mean_gates = self.gates[number] / tokens
        router, gate = (full(weight).detach() for weight in (layer.router_weight, layer.gate_weight))
        return {
            "load": counts.tolist(),
            "load_variation": load_variation(counts).item(),
            "max_vio_global": max_vio(counts).item(),
            "dead": dead_fraction(counts).item(),
            **{name: sums[name] for name in PER_TOKEN[:4]},
            "overlap_chance": chance_overlap(hidden_dim),
            "overlap_y": sums["overlap_y"],
            "overlap_y_chance": chance_overlap(router.shape[1]),
            "routing_variance": (sums["squared_gates"] - mean_gates.square().sum().item()) / experts,
            "mean_gate_imbalance": mean_gate_imbalance(mean_gates.unsqueeze(0)).item(),
            "domain_load": [counts.tolist()],
            "domain_information": 0.0,
            "erc_eps": coupling_noise_bound(router.float()).tolist(),
            "erc_M": expert_response(router.float(), gate.float()).tolist(),
        }

    def _pair(self, pair: int) -> dict[str, Any]:
        joint, first = self.joint[pair].double(), self.first_joint[pair].double()
        matching, kappa = match_experts(first)
        return {
            "kappa": kappa,
            "kappa_chance": match_experts(torch.outer(first.sum(1), first.sum(0)))[1],
            "matching": matching.tolist(),
            "cond": (joint / self.counts[pair].clamp(min=1).unsqueeze(1)).tolist(),
        }


def first_choice(ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """(T,), the expert with the largest gate: routers do not all return it first."""
    return ids_TK.gather(1, gates_TK.argmax(1, keepdim=True)).squeeze(1)


def full(weight: Tensor) -> Tensor:
    """The whole of a parameter that FSDP2 has split."""
    gathered = getattr(weight, "full_tensor", None)
    return weight if gathered is None else gathered()


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means of every number."""
    names = [name for name, value in rows[0].items() if isinstance(value, int | float)] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}
