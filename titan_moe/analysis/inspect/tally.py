"""What `inspect` accumulates while text runs through the model. The sums add up over batches and ranks.

L MoE layers, E experts, K chosen experts, T tokens of a batch, D model width.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh
from torchtitan_ext.collectives import all_sum
from torchtitan_ext.metrics import domain_load, margins, token_entropy
from torchtitan_ext.ops.gram import squared_cosines, token_gram
from torchtitan_ext.ops.routing import normalize_scores
from torchtitan_ext.terms import LayerView, Needs, Setting, Term, TermOptions, Terms

PER_TOKEN = ("entropy", "topk_mass", "margin", "overlap", "overlap_y", "squared_gates")
Positions = npt.NDArray[np.int64]


class Sample(NamedTuple):
    """Router inputs of some tokens at one layer."""

    positions: list[Positions]
    """Positions in the text, of this rank's tokens."""
    inputs: list[Tensor]
    """(n, D) float32."""
    top1: list[Tensor]
    """(n,) experts with the largest gate."""


@dataclass
class Tally:
    """Everything collected from this rank's tokens."""

    layers: int
    experts: int
    domains: int
    seq_len: int
    """Tokens per sequence, over all context-parallel ranks."""
    device: torch.device
    domain_at: Callable[[Positions], Positions]
    """Positions in the text to their domains."""
    sampled: npt.NDArray[np.bool_]
    """By position in the text: whether the router inputs are kept."""
    examples: int
    """How many tokens with the largest gates are kept for each expert."""
    kept_routing: int = 0
    """The chosen experts of this many first positions are kept, to be compared with another checkpoint's."""
    sequences: int = 0
    """Rows per expert are counted for each of this many sequences; 0: not counted."""
    samples: dict[int, Sample] = field(default_factory=dict)
    routing: dict[int, list[tuple[Positions, Tensor]]] = field(default_factory=dict)
    """By layer: positions, and chosen experts (n, K) int16."""

    def __post_init__(self) -> None:
        shape = (self.layers, self.experts)

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=self.device)

        self.sums = zeros(self.layers, len(PER_TOKEN), dtype=torch.float64)
        self.gates = zeros(*shape, dtype=torch.float64)
        self.counts = zeros(*shape)
        self.first_counts = zeros(*shape)
        self.domain_load = zeros(self.layers, self.domains, self.experts)
        self.joint = zeros(max(self.layers - 1, 0), self.experts, self.experts)
        self.first_joint = torch.zeros_like(self.joint)
        self.sequence_load = zeros(self.sequences, self.layers, self.experts)
        self.best_gates = torch.full((*shape, self.examples), -torch.inf, dtype=torch.float64, device=self.device)
        self.best_positions = torch.full((*shape, self.examples), -1, dtype=torch.int64, device=self.device)

    def add_layer(self, view: LayerView, inputs_TD: Tensor | None) -> None:
        """Adds one layer's view of a batch. inputs_TD: router inputs, None when none are sampled."""
        layer, tokens = view.layer, view.tokens
        labelled_T = (tokens.weights > 0).flatten()
        positions_T = (tokens.sequences.unsqueeze(1) * self.seq_len + tokens.sequence_positions).flatten()
        ids_TK, weights_T = view.topk_ids_TK, labelled_T.to(torch.float64)
        gates_TK = normalize_scores(view.gates_TK)
        k = ids_TK.shape[1]
        pairs = max(k * (k - 1), 1)
        assert view.z_RF is not None
        assert view.y_RD is not None
        values = torch.stack(
            [
                token_entropy(view.scores_TE),
                view.scores_TE.gather(1, ids_TK).sum(1),
                margins(view.scores_TE, k),
                squared_cosines(token_gram(view.z_RF, view.rows_TK, scaled=True)) / pairs,
                squared_cosines(token_gram(view.y_RD, view.rows_TK, scaled=True)) / pairs,
                gates_TK.square().sum(1),
            ]
        )
        self.sums[layer] += values.to(torch.float64) @ weights_T
        chosen, gates = ids_TK[labelled_T], gates_TK[labelled_T]
        self.gates[layer] += torch.zeros_like(self.gates[layer]).scatter_add(
            0, chosen.flatten(), gates.flatten().to(torch.float64)
        )
        self.counts[layer] += torch.bincount(chosen.flatten(), minlength=self.experts)
        self.first_counts[layer] += torch.bincount(chosen[:, 0], minlength=self.experts)
        positions = positions_T[labelled_T]
        positions_cpu = positions.cpu().numpy()
        domains = torch.from_numpy(self.domain_at(positions_cpu)).to(self.device)
        self.domain_load[layer] += domain_load(chosen, domains, self.experts, self.domains)
        self.keep_examples(layer, chosen, gates, positions)
        if self.sequences:
            rows_T = (positions // self.seq_len).unsqueeze(1) * self.experts
            load = torch.bincount((rows_T + chosen).flatten(), minlength=self.sequences * self.experts)
            self.sequence_load[:, layer] += load.view(self.sequences, self.experts)
        compared = positions_cpu < self.kept_routing
        if compared.any():
            rows = torch.from_numpy(compared).to(self.device)
            self.routing.setdefault(layer, []).append((positions_cpu[compared], chosen[rows].to(torch.int16).cpu()))
        if inputs_TD is not None:
            kept = self.sampled[positions_cpu]
            rows = torch.from_numpy(kept).to(self.device)
            sample = self.samples.setdefault(layer, Sample([], [], []))
            sample.positions.append(positions_cpu[kept])
            sample.inputs.append(inputs_TD[labelled_T][rows].float().cpu())
            sample.top1.append(chosen[rows, 0].cpu())

    def keep_examples(self, layer: int, chosen: Tensor, gates: Tensor, positions: Tensor) -> None:
        """Updates each expert's tokens with the largest gates by those of a batch; of equal gates the earlier
        position."""
        if self.examples == 0 or len(chosen) == 0:
            return
        gates_TE = torch.full((len(chosen), self.experts), -torch.inf, dtype=torch.float64, device=self.device)
        gates_TE.scatter_(1, chosen, gates.to(torch.float64))
        best = gates_TE.topk(min(self.examples, len(chosen)), dim=0)
        values = torch.cat([self.best_gates[layer], best.values.t()], dim=1)
        candidates = torch.cat([self.best_positions[layer], positions[best.indices.t()]], dim=1)
        self.best_gates[layer], self.best_positions[layer] = largest(values, candidates, self.examples)

    def add_pairs(self, neighbours: dict[int, tuple[Tensor, Tensor]], labelled_T: Tensor) -> None:
        """Counts how often an expert of one layer and one of the next are chosen for the same token.

        neighbours: by the earlier layer, the chosen experts (T, K) of both."""
        experts = self.experts
        for pair, (earlier, later) in neighbours.items():
            a, b = earlier[labelled_T], later[labelled_T]
            both = a.unsqueeze(2) * experts + b.unsqueeze(1)
            self.joint[pair] += torch.bincount(both.flatten(), minlength=experts**2).view(experts, experts)
            first = a[:, 0] * experts + b[:, 0]
            self.first_joint[pair] += torch.bincount(first, minlength=experts**2).view(experts, experts)

    def sum_over_ranks(self, mesh: Mesh) -> None:
        """Adds up the sums over data-parallel ranks, and over pipeline stages, which have different layers."""
        for name in ("sums", "gates", "counts", "first_counts", "domain_load", "joint", "first_joint", "sequence_load"):
            setattr(self, name, all_sum(all_sum(getattr(self, name), mesh.ranks.data), mesh.pp))


def largest(values: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row and their positions; of equal values the smaller position first."""
    order = positions.argsort(dim=1, stable=True)
    values, positions = values.gather(1, order), positions.gather(1, order)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    return values.gather(1, order), positions.gather(1, order)


class Recorder(Term):
    """A term of value 0 that passes every layer's view to a tally."""

    name = "recorder"
    needs = Needs(activations=True, outputs=True)

    def __init__(self) -> None:
        super().__init__(TermOptions(), Setting(top_k=0))
        self.tally: Tally | None = None
        """The tally to fill."""
        self.inputs: dict[int, Tensor] = {}
        """By layer, the last input of its router."""

    def value(self, view: LayerView) -> Tensor:
        if self.tally is not None:
            self.tally.add_layer(view, self.inputs.pop(view.layer, None))
        return view.weights_T.new_zeros(())


def record(model: Transformer, recorder: Recorder, inputs: bool) -> None:
    """Replaces the terms of every MoE layer by the recorder. inputs: record the router inputs too."""
    model.terms = Terms([recorder])
    for moe in model.moe_modules():
        moe.terms = model.terms

        def keep(module: nn.Module, arguments: tuple[Tensor, ...], layer: int = moe.layer) -> None:  # noqa: ARG001
            recorder.inputs[layer] = arguments[0].detach()

        if inputs:
            moe.router.register_forward_pre_hook(keep)


def unchanged_choices(before: Tally, after: Tally) -> Tensor:
    """Sums over this rank's kept tokens, (L, 3) float64: unchanged first choices, unchanged fraction of the k choices,
    tokens.

    Both tallies must come from the same text in the same batches."""
    sums = torch.zeros(before.layers, 3, dtype=torch.float64)
    for layer, parts in before.routing.items():
        for (positions, old), (others, new) in zip(parts, after.routing[layer], strict=True):
            assert np.array_equal(positions, others)
            kept = (old.unsqueeze(2) == new.unsqueeze(1)).any(2).to(torch.float64).mean(1).sum()
            sums[layer] += torch.tensor([(old[:, 0] == new[:, 0]).sum(), kept, len(old)], dtype=torch.float64)
    return sums


def merged(parts: list[dict[int, Sample]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Samples of all ranks by layer, in the order of the text: router inputs (N, D), first choices (N,)."""
    by_layer: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in sorted({*itertools.chain.from_iterable(parts)}):
        samples = [part[layer] for part in parts if layer in part]
        positions = np.concatenate([positions for sample in samples for positions in sample.positions])
        # Tensor-parallel ranks process the same tokens and each report them.
        _, order = np.unique(positions, return_index=True)
        rows = torch.from_numpy(order)
        inputs = torch.cat([x for sample in samples for x in sample.inputs])[rows]
        by_layer[layer] = inputs, torch.cat([x for sample in samples for x in sample.top1])[rows]
    return by_layer
