"""The enabled terms of a run, and how one MoE layer adds them to the carry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchtitan_ext.terms.base import (
    REGISTRY,
    ExpertRows,
    LayerView,
    Needs,
    Probes,
    Setting,
    Term,
    Tokens,
    matched,
)

if TYPE_CHECKING:
    from torch import Tensor

    from torchtitan_ext.carry import Carry

TOKEN_MEASURES = ("entropy", "topk_mass")
"""Measures of every MoE layer, whatever terms are enabled."""


def build_terms(
    options: Mapping[str, Any],
    setting: Setting,
    measure: Sequence[str] = (),
    registry: Mapping[str, type[Term]] = REGISTRY,
) -> Terms:
    """The terms that must be computed: those with a weight, and those to be measured.

    options: by name, a term's options as its `Options` instance, as a table, or its weight alone. measure: names of terms to
    compute at weight 0 too. Raises KeyError for an unknown name, pydantic.ValidationError for a wrong option.
    """
    terms = []
    for name in dict.fromkeys([*options, *measure]):
        kind = registry[name]
        given = options.get(name, {"weight": 0.0})
        if isinstance(given, int | float):
            given = {"weight": float(given)}
        chosen = kind.Options.model_validate(given) if isinstance(given, Mapping) else given
        if chosen.weight > 0 or name in measure:
            terms.append(kind(chosen, setting))
    order = list(registry)
    return Terms(sorted(terms, key=lambda term: order.index(term.name)))


def _union(needs: Iterable[Needs]) -> Needs:
    return Needs(*(any(flags) for flags in zip(Needs(), *needs, strict=True)))


def _overrides(term: type[Term], name: str, other: str) -> bool:
    """Whether a method is as specific as another: `activate` is not where a subclass of a built-in term has only overridden
    `observe`."""
    own, others = (next(c for c in term.__mro__ if method in vars(c)) for method in (name, other))
    return issubclass(own, others)


class Terms:
    """The enabled terms, in the order of `Carry.terms`."""

    def __init__(self, terms: Sequence[Term] = ()) -> None:
        self.terms = tuple(terms)
        self.names = tuple(term.name for term in terms)
        self.measures = (*TOKEN_MEASURES, *(name for term in terms for name in term.measures))
        """Names of the columns of `Carry.sums`."""
        self.needs = _union(term.needs for term in terms)
        self.needs_gradient = _union(term.needs for term in terms if term.weighted)
        """The same of terms with a weight above 0: what gradients pass through."""
        self._weights: tuple[Any, Any] = (None, None)
        self.joining = tuple(term for term in terms if _overrides(type(term), "activate", "observe"))
        """Terms whose `activate` may be called in place of `observe`."""
        self.observing = tuple(term for term in terms if type(term).observe is not Term.observe)
        self.gating = tuple(term for term in self.joining if _overrides(type(term), "activate_gated", "activate"))
        """Terms whose `activate_gated` may be."""

    def objective(self, terms: Tensor, factors: Mapping[str, float] | None = None) -> Tensor:
        """The weighted sum of `Carry.terms` (N,), after `complete`, to be added to the cross-entropy.

        factors: by term name, what its weight is multiplied by at this step (warm-up, scaling to lb); 1 when not given.
        """
        factors = factors or {}
        weights = tuple(term.options.weight * factors.get(term.name, 1.0) for term in self.terms)
        return terms @ self._on_device(weights, terms)

    def _on_device(self, weights: tuple[float, ...], like: Tensor) -> Tensor:
        """Weights as a tensor. They seldom change, and copying them to a GPU would make the host wait."""
        import torch

        key = (weights, like.dtype, like.device)
        if self._weights[0] != key:
            made = torch.tensor(weights, dtype=like.dtype, pin_memory=like.is_cuda)
            self._weights = (key, made.to(like.device, non_blocking=True))
        return self._weights[1]

    def factors(self, step: int, scales: Mapping[str, float]) -> dict[str, float]:
        """What each weight is multiplied by at a step (1 is the first): warm-up, and the scale from `scales_to_lb`."""
        warmups = {term.name: term.options.warmup_steps for term in self.terms}
        return {
            name: (min(1.0, step / steps) if steps else 1.0) * scales.get(name, 1.0) for name, steps in warmups.items()
        }

    @property
    def matched(self) -> list[str]:
        """Terms with a weight that are scaled to the size of lb."""
        return [term.name for term in self.terms if matched(term.options)]

    def scales_to_lb(self, values: Mapping[str, float]) -> dict[str, float]:
        """`10^round(log10(R_lb / |R|))` of every matched term; 1 where that is not a finite number, as for a term that is 0.
        values: terms of the first step."""
        ratios = {name: values["lb"] / abs(values[name]) if values[name] else 0.0 for name in self.matched}
        return {
            name: 10.0 ** round(math.log10(ratio)) if 0.0 < ratio < math.inf else 1.0 for name, ratio in ratios.items()
        }

    def carried_width(self, experts: int) -> int:
        """Numbers per token that terms carry from one MoE layer to the next."""
        return sum(term.carried_width(experts) for term in self.terms)

    def sums_width(self, experts: int) -> int:
        """Numbers per layer that terms with a `total` sum over tokens: columns of `Carry.term_sums`."""
        return sum(term.sums_width(experts) for term in self.terms)

    def probes(self, router_weight_ED: Tensor, layer: int, tokens: Tokens) -> Probes | None:
        """The vectors whose gate projections terms need, if one does."""
        import torch

        asked = {term.name: term.probes(router_weight_ED, layer, tokens) for term in self.terms}
        given = {name: vectors for name, vectors in asked.items() if vectors is not None}
        if not given:
            return None
        vectors = list(given.values())
        counts = {name: len(part) for name, part in given.items()}
        return Probes(torch.cat(vectors) if len(vectors) > 1 else vectors[0], counts)

    def samples(self, layer: int, tokens: Tokens) -> dict[str, tuple[Tensor, Tensor]]:
        """The tokens, and their weights, of every term that samples some."""
        drawn = {term.name: term.sample(layer, tokens) for term in self.terms}
        return {name: sample for name, sample in drawn.items() if sample is not None}

    def activate_gated(
        self, gate_up: Tensor, gates: Tensor, view: LayerView, rows: ExpertRows
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """`activate` with each row of z times its gate weight, in one pass; None where a term needs z or y without it, or no
        kernel can.

        gates: (T, K), or at experts that are on other ranks than their tokens one per row."""
        from torchtitan_ext.ops import select
        from torchtitan_ext.ops.routing import gates_by_row
        from torchtitan_ext.ops.swiglu import swiglu

        if not select.fused(gate_up) or any(self.needs):
            return None
        if not self.observing:
            if gates.dim() == 2:
                gates = gates_by_row(gates, view.rows_TK)
            return swiglu(gate_up, gates), {}
        if len(self.observing) > 1 or self.observing[0] not in self.gating or gates.dim() != 2:
            return None
        found = self.observing[0].activate_gated(gate_up, gates, view, rows)
        return None if found is None else (found[0], {self.observing[0].name: found[1]})

    def activate(self, gate_up: Tensor, view: LayerView, rows: ExpertRows) -> tuple[Tensor, dict[str, Any]]:
        """SwiGLU, then `observe`; in one pass where a kernel computes what a term needs.

        gate_up: (R, 2F), the experts' gate and up projections."""
        from torchtitan_ext.ops.swiglu import swiglu

        for term in self.joining:
            fused = term.activate(gate_up, view, rows)
            if fused is not None:
                z_RF, observed = self.observe(fused[0], view, rows, skip=term.name)
                return z_RF, {term.name: fused[1], **observed}
        return self.observe(swiglu(gate_up), view, rows)

    def observe(
        self, z_RF: Tensor, view: LayerView, rows: ExpertRows, skip: str | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Between activation and down projection: the activations to continue with, and what each term took from them.

        skip: the name of a term that has what it needs."""
        observed = {}
        for term in self.terms:
            if term.name == skip:
                continue
            z_RF, observed[term.name] = term.observe(z_RF, view, rows)
        return z_RF, observed

    def add(self, view: LayerView, observed: Mapping[str, Any], probes: Probes | None, carry: Carry) -> Carry:
        """The carry with this layer's terms and measures added.

        view: its `responses_PE` holds those of all terms' probes. observed, probes: what `observe` and `probes` returned.
        """
        import torch

        from torchtitan_ext.carry import Carry

        dtype, experts = carry.terms.dtype, view.scores_TE.shape[-1]
        widths = [term.carried_width(experts) for term in self.terms]
        previous = carry.previous.split(widths, dim=1) if sum(widths) else [None] * len(widths)
        responses: dict[str, Tensor] = {}
        if probes is not None:
            assert view.responses_PE is not None
            parts = view.responses_PE.split(list(probes.counts.values()))
            responses = dict(zip(probes.counts, parts, strict=True))
        values, token_sums, measured = [], [], []
        for term, before in zip(self.terms, previous, strict=True):
            name = term.name
            own = view._replace(previous=before, observed=observed.get(name), responses_PE=responses.get(name))
            own = own if term.weighted else own.detach()
            if term.sums_width(experts):
                token_sums.append(term.token_sums(own).to(dtype))
                values.append(carry.terms.new_zeros(()))
                continue
            value = term.value(own)
            values.append(value.to(dtype))
            measured.append((term, own, value))
        with torch.no_grad():
            measures = token_measures(view)
            for term, own, value in measured:
                measures |= term.measure(own, value)
            counts = torch.select_scatter(carry.counts, view.counts_E, 0, view.layer)
            columns = torch.stack([measures[name] for name in self.measures])
            sums = torch.select_scatter(carry.sums, columns.to(carry.sums.dtype), 0, view.layer)
        carried = [term.carried(view) for term, width in zip(self.terms, widths, strict=True) if width]
        after = carried[0] if len(carried) == 1 else torch.cat(carried, dim=1) if carried else carry.previous
        # Not `carry._replace`: compiled by torch 2.11, it returns an empty tuple.
        terms = carry.terms + torch.stack(values) if values else carry.terms
        every_layer = carry.term_sums
        if token_sums:
            row = token_sums[0] if len(token_sums) == 1 else torch.cat(token_sums)
            every_layer = torch.select_scatter(every_layer, row, 0, view.layer)
        return Carry(terms, after, every_layer, counts, sums)

    def complete(self, carry: Carry) -> Carry:
        """The carry after the last layer, with the terms that are formed once per microbatch (`Term.total`); a collective where
        one of them needs other ranks' tokens. To be called before `objective`."""
        import torch

        widths = [term.sums_width(carry.counts.shape[1]) for term in self.terms]
        if not sum(widths):
            return carry
        parts = carry.term_sums.split(widths, dim=1)
        totals = [
            term.total(sums_Ln, carry.counts) if width else carry.terms.new_zeros(())
            for term, width, sums_Ln in zip(self.terms, widths, parts, strict=True)
        ]
        return carry._replace(terms=carry.terms + torch.stack(totals))

    def totals_by_layer(self, carry: Carry) -> Tensor:
        """What `complete` adds to the terms, layer by layer: (L, N), with a collective for each layer."""
        import torch

        layers = carry.counts.shape[0]
        rows = (
            self.complete(
                carry._replace(
                    terms=torch.zeros_like(carry.terms),
                    term_sums=carry.term_sums[n : n + 1],
                    counts=carry.counts[n : n + 1],
                )
            ).terms
            for n in range(layers)
        )
        return torch.stack(list(rows))


def token_measures(view: LayerView) -> dict[str, Tensor]:
    """TOKEN_MEASURES: weighted sums over tokens. Call it under torch.no_grad()."""
    from torchtitan_ext.metrics import token_entropy
    from torchtitan_ext.ops.routing import weighted_sum

    if view.sums is not None:
        return {
            "entropy": weighted_sum(view.sums.entropy_T, view.weights_T),
            "topk_mass": weighted_sum(view.sums.chosen_mass_T, view.weights_T),
        }
    mass_T = view.scores_TE.gather(1, view.topk_ids_TK).sum(1)
    return {
        "entropy": weighted_sum(token_entropy(view.scores_TE), view.weights_T),
        "topk_mass": weighted_sum(mass_T, view.weights_T),
    }
