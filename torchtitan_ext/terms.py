"""The enabled regularizers of a run, and how one MoE layer adds its share of them to the carry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtitan_ext.carry import Carry
from torchtitan_ext.collectives import Ranks, all_sum
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.losses import (
    coupling_excess,
    coupling_noise,
    coupling_source_mass,
    coupling_target_mass,
    expert_load,
    joint_coupling,
    load_balance_loss,
    load_shares,
    orthogonality_loss,
    router_z_loss,
    routing_variance_loss,
    sketch_rows,
    sketched_cosines,
    transition_coupling,
    weighted_mean,
    weighted_sum,
)
from torchtitan_ext.metrics import token_entropy
from torchtitan_ext.ops import draws
from torchtitan_ext.ops.gram import squared_cosines, token_gram


class LayerView(NamedTuple):
    """What a regularizer sees of one MoE layer.

    T tokens, E experts, K chosen, R routed rows, F expert hidden width, D model width.
    """

    logits_TE: Tensor
    """Router logits, float32."""
    scores_TE: Tensor
    """Routing scores, normalised to sum to 1."""
    topk_ids_TK: Tensor
    """The chosen experts, bias included."""
    gates_TK: Tensor
    """Gate weights of the chosen experts."""
    z_RF: Tensor | None
    """SwiGLU activations, sorted by expert; None where experts are on other ranks and no term asked for them."""
    y_RD: Tensor | None
    """Expert outputs before the gate weight, sorted likewise; None where no term asked for them."""
    rows_TK: Tensor
    """Row of `z_RF` and `y_RD` that holds token i's a-th expert."""
    gram: "WeightedGram | None" = None
    """Gram matrices of z that the layer took for sp on the way, when `Terms.gram_rows` asked for them."""
    sketches: "Sketches | None" = None
    """Sketches of z, when `Terms.sketch_keys` asked for them."""
    response_EE: Tensor | None = None
    """erc's activation matrix, when `Terms.proxies` asked for it."""

    def detach(self) -> "LayerView":
        tensors: dict[str, Any] = {
            name: value.detach() for name, value in self._asdict().items() if isinstance(value, Tensor)
        }
        return self._replace(gram=None, **tensors)


class GramRows(NamedTuple):
    """The tokens whose Gram matrices sp is computed from: N of them."""

    rows_NK: Tensor
    weights_N: Tensor
    whole: bool
    """Whether these are all tokens, by the method and not by chance: the same on every rank."""


class Sketches(NamedTuple):
    """What sp by sketches needs of every routed row, sorted as z is."""

    sketched_RM: Tensor
    """In the type of z."""
    norms_R: Tensor
    """Squared lengths, in at least float32."""


class WeightedGram(NamedTuple):
    gram_NKK: Tensor
    weights_N: Tensor


class Tokens(NamedTuple):
    """What a layer must know of the tokens of a micro-batch: B sequences of S."""

    weights: Tensor
    """(B, S), 1 / (labelled tokens of the global batch) on labelled tokens and 0 elsewhere; at least float32."""
    sequences: Tensor
    """(B,) int64, index of each sequence in the global batch: the key of draws per token."""
    step: Tensor
    """() int64, the optimizer step: the key of every draw."""
    places: Tensor
    """(S,) int64, where each of these tokens stands in its sequence: the other key of draws per token."""
    share: float = 1.0
    """This micro-batch's share of the terms that no token enters (erc); with 0 they are not computed."""


class Site(NamedTuple):
    """One term's place of work: a layer, its tokens, and what came before."""

    view: LayerView
    previous: Tensor
    layer: int
    tokens: Tokens
    weights_T: Tensor
    counts_E: Tensor


@dataclass(frozen=True)
class Terms:
    """Which terms a run has, in the order of `Carry.terms`, and their options."""

    weights: Mapping[str, float]
    """Weight in the objective of every enabled term; 0 for a term that is only measured."""
    top_k: int
    seed: int = 0
    lb_scope: str = "global"
    sp_method: str = "exact"
    sp_sketch_dim: int = 64
    sp_sample_fraction: float = 0.125
    sp_floor: float = 0.0
    """What sp leaves unpunished of every squared cosine: 1/F, or 0."""
    cp_source: str = "all"
    cp_form: str = "mass"
    o_variant: str = "paper"
    v_variant: str = "paper"
    v_scope: str = "sequence"
    erc_alpha: float = 1.0
    erc_detach_router: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    """The ranks that share a micro-step."""
    custom: Mapping[str, Callable[[LayerView], Tensor]] = field(default_factory=dict)
    """Terms beside the built-in ones: a value per token."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def objective(self, terms: Tensor, factors: Mapping[str, float] | None = None) -> Tensor:
        """The weighted sum of `Carry.terms`, to be added to the cross-entropy.

        factors: what each weight is multiplied by at this step (a warm-up, a scaling); 1 when not given.
        """
        weights = [
            weight * (1.0 if factors is None else factors.get(name, 1.0)) for name, weight in self.weights.items()
        ]
        return terms @ terms.new_tensor(weights)

    def gram_rows(self, rows_TK: Tensor, layer: int, tokens: Tokens) -> GramRows | None:
        """The rows of z whose Gram matrices a layer should take between activation and down projection, if any."""
        if self.weights.get("sp", 0.0) > 0 and self.sp_method in ("exact", "sample"):
            return self._sp_rows(rows_TK, layer, tokens)
        return None

    def sketch_keys(self, layer: int, tokens: Tokens) -> Tensor | None:
        """What the signs of each token's sketches are drawn by (T,), when sp is to be had from sketches."""
        if "sp" not in self.weights or self.sp_method != "sketch":
            return None
        places = _places(tokens)
        return draws.keyed_bits(
            draws.SP_SIGNS, self.seed, layer, tokens.step, *places, device=tokens.weights.device
        ).flatten()

    def sketch(self, z_RF: Tensor, keys_R: Tensor, layer: int, tokens: Tokens, first: int = 0) -> "Sketches":
        """The sketches of rows by their tokens' keys. first: where these hidden units begin, if they are a part of them."""
        dtype, width = accumulation_dtype(z_RF.dtype), z_RF.shape[1]
        if self.weights["sp"] == 0:
            z_RF = z_RF.detach()
        distinct, index_R = draws.distinct(keys_R)
        signs_RF = draws.signs_of(distinct, width, dtype, first).index_select(0, index_R)
        dims = torch.arange(self.sp_sketch_dim, device=z_RF.device)
        bits = draws.keyed_bits(draws.SP_SKETCH, self.seed, layer, tokens.step, dims, device=z_RF.device)
        return Sketches(*sketch_rows(z_RF, signs_RF, draws.signs_of(bits, width, dtype, first)))

    def proxies(self, router_weight_ED: Tensor, layer: int, tokens: Tokens) -> Tensor | None:
        """erc's noisy routing vectors (E, D), whose answers by every expert a layer should take, if it should."""
        if "erc" not in self.weights or tokens.share == 0.0:
            return None
        if self.erc_detach_router or self.weights["erc"] == 0:
            router_weight_ED = router_weight_ED.detach()
        dtype, device = accumulation_dtype(router_weight_ED.dtype), router_weight_ED.device
        router_weight_ED = router_weight_ED.to(dtype)
        experts, dim = (torch.arange(size, device=device) for size in router_weight_ED.shape)
        key = (draws.ERC_NOISE, self.seed, layer, tokens.step)
        uniform = draws.keyed_uniform(*key, rows_B=experts, columns_S=dim, device=device, dtype=dtype)
        return router_weight_ED * coupling_noise(router_weight_ED.detach(), uniform)

    def _sp_rows(self, rows_TK: Tensor, layer: int, tokens: Tokens) -> GramRows:
        weights_T = tokens.weights.flatten()
        if self.sp_method == "exact":
            return GramRows(rows_TK, weights_T, whole=True)
        key = (draws.SP_SAMPLE, self.seed, layer, tokens.step)
        places = {"rows_B": tokens.sequences, "columns_S": tokens.places}
        drawn = draws.drawn(self.sp_sample_fraction, *key, **places, device=rows_TK.device)
        return GramRows(
            rows_TK.index_select(0, drawn), weights_T.index_select(0, drawn) / self.sp_sample_fraction, False
        )

    @property
    def needs_activations(self) -> bool:
        """Whether a term reads `LayerView.z_RF` itself, and not only Gram matrices that `gram_rows` asked for."""
        return bool(self.custom) or (self.weights.get("sp") == 0.0 and self.sp_method != "sketch")

    @property
    def needs_outputs(self) -> bool:
        """Whether a term reads `LayerView.y_RD`."""
        return bool(self.custom) or "o" in self.weights

    def previous_width(self, experts: int) -> int:
        """Numbers per token that cp needs of the previous MoE layer: all its scores, or one mass; none without cp."""
        if "cp" not in self.weights:
            return 0
        return experts if self.cp_source == "transition" else 1

    def add(self, view: LayerView, carry: Carry, layer: int, tokens: Tokens) -> Carry:
        """The carry with this layer's terms and measures added. layer: index among the MoE layers, from 0."""
        dtype = carry.terms.dtype
        weights_T = tokens.weights.flatten().to(dtype)
        counts_E = _labelled_counts(view.topk_ids_TK, view.scores_TE.shape[-1], weights_T)
        site = Site(view, carry.previous, layer, tokens, weights_T, counts_E)
        measured = site._replace(view=view.detach(), previous=carry.previous.detach())
        values = {
            name: self._value(name, site if weight > 0 else measured).to(dtype) for name, weight in self.weights.items()
        }
        terms = carry.terms + torch.stack(list(values.values())) if values else carry.terms
        with torch.no_grad():
            counts = torch.select_scatter(carry.counts, counts_E, 0, layer)
            overlap = values.get("sp")
            if overlap is not None and self.sp_floor > 0.0:  # the measure is of whole squared cosines
                overlap = self._specialization(site if self.weights["sp"] > 0 else measured, 0.0)
            measures = self._measures(measured, overlap)
            sums = torch.select_scatter(carry.sums, measures.to(carry.sums.dtype), 0, layer)
        return Carry(terms, self._previous(view) if "cp" in self.weights else carry.previous, counts, sums)

    def _value(self, name: str, site: Site) -> Tensor:
        """One term's share of the global batch from this layer and micro-batch."""
        view, weights_T = site.view, site.weights_T
        if name == "lb":
            return self._load_balance(site)
        if name == "z":
            return router_z_loss(view.logits_TE, weights=weights_T)
        if name == "sp":
            return self._specialization(site, self.sp_floor)
        if name == "cp":
            return self._coupling(site)
        if name == "o":
            assert view.y_RD is not None
            return orthogonality_loss(view.y_RD, self.o_variant, rows=view.rows_TK, weights=weights_T)
        if name == "v":
            return self._variance(site)
        if name == "erc":
            return self._expert_router_coupling(site)
        return weighted_sum(self.custom[name](view), weights_T)

    def _load_balance(self, site: Site) -> Tensor:
        view, weights = site.view, site.tokens.weights
        if self.lb_scope == "sequence":
            scores, ids = view.scores_TE.unflatten(0, weights.shape), view.topk_ids_TK.unflatten(0, weights.shape)
            load = all_sum(expert_load(ids, scores.shape[-1], weights), self.ranks.sequence)
            return load_balance_loss(scores, ids, load_shares(load), weights=weights)
        counts_E = site.counts_E if self.lb_scope == "microbatch" else all_sum(site.counts_E, self.ranks.data)
        load = load_shares(counts_E.to(weights.dtype))
        return load_balance_loss(view.scores_TE, view.topk_ids_TK, load, weights=site.weights_T)

    def _specialization(self, site: Site, floor: float) -> Tensor:
        view, tokens = site.view, site.tokens
        if view.gram is not None:
            return weighted_sum(squared_cosines(view.gram.gram_NKK, floor), view.gram.weights_N)
        if view.sketches is not None:
            found = view.sketches
            return weighted_sum(
                sketched_cosines(found.sketched_RM[view.rows_TK], found.norms_R[view.rows_TK]), site.weights_T
            )
        assert view.z_RF is not None
        chosen = self._sp_rows(view.rows_TK, site.layer, tokens)
        gram = token_gram(view.z_RF, chosen.rows_NK)
        return weighted_sum(squared_cosines(gram, floor), chosen.weights_N)

    def _coupling(self, site: Site) -> Tensor:
        if site.layer == 0:
            return site.previous.sum() * 0.0
        if self.cp_source == "transition":
            return transition_coupling(site.previous, site.view.scores_TE, self.top_k, site.weights_T, self.ranks.data)
        target_T = coupling_target_mass(site.view.scores_TE, self.top_k)
        return weighted_sum(joint_coupling(site.previous.squeeze(1), target_T, self.cp_form), site.weights_T)

    def _previous(self, view: LayerView) -> Tensor:
        """What cp needs of this layer in the next one: (T, E) or (T, 1)."""
        if self.cp_source == "transition":
            return view.scores_TE
        # A copy: wrappers of a block (FSDP's) hang their hooks on its outputs, and mistrust views.
        return coupling_source_mass(view.scores_TE, view.topk_ids_TK, self.cp_source).unsqueeze(1).clone()

    def _variance(self, site: Site) -> Tensor:
        view, weights = site.view, site.tokens.weights
        shares_TK = view.gates_TK / view.gates_TK.sum(1, keepdim=True)
        gates_TE = torch.zeros_like(view.scores_TE).scatter(1, view.topk_ids_TK, shares_TK)
        group = {"sequence": self.ranks.sequence, "global": self.ranks.data, "microbatch": None}[self.v_scope]
        if self.v_scope == "sequence":
            gates_TE = gates_TE.unflatten(0, weights.shape)
        else:
            weights = site.weights_T
        mean = weighted_mean(gates_TE, weights.to(gates_TE.dtype), group) if self.v_variant == "paper" else None
        return routing_variance_loss(gates_TE, self.v_variant, mean, weights=weights)

    def _expert_router_coupling(self, site: Site) -> Tensor:
        """Token-free, so a step needs it once: 0 where the layer was not asked for it."""
        if site.view.response_EE is None:
            return site.weights_T.new_zeros(())
        return coupling_excess(site.view.response_EE, self.erc_alpha) * site.tokens.share

    def _measures(self, site: Site, specialization: Tensor | None) -> Tensor:
        view, weights_T = site.view, site.weights_T
        k = view.topk_ids_TK.shape[1]
        mass_T = view.scores_TE.gather(1, view.topk_ids_TK).sum(1)
        overlap = weights_T.new_zeros(()) if specialization is None or k == 1 else specialization / (k * (k - 1))
        entropy_T = token_entropy(view.scores_TE)
        return torch.stack([weighted_sum(entropy_T, weights_T), weighted_sum(mass_T, weights_T), overlap.detach()])


def _places(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Sequence in the global batch (B, 1) and position in it (S,) of every token: what draws per token are keyed by."""
    return tokens.sequences.unsqueeze(1), tokens.places


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
