"""Perplexity and bits per byte on text that is never trained on, and the routing that goes with them."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titan_moe.data.loader import Batch, DataRank, Windows, validation_batches
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.context import take_part
from titan_moe.parallel.mesh import Mesh
from titan_moe.train.inputs import to_inputs
from torchtitan_ext.collectives import all_sum
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.metrics import conditional_routing


class Losses(NamedTuple):
    """Of a text."""

    tokens: int
    """Labelled ones."""
    loss: float
    """Mean cross-entropy in nats per token."""
    perplexity: float
    bits_per_byte: float
    """Bits per byte of source text."""


class Validation(NamedTuple):
    losses: Losses
    load: Tensor
    """(L, E) share of the assignments per expert and MoE layer."""
    cond: Tensor
    """(L - 1, E, E), P(v in the next layer given e in this one)."""


@torch.no_grad()
def validate(
    model: Transformer,
    windows: Windows,
    tokenizer: Tokenizer,
    sequences: int,
    batch_size: int,
    mesh: Mesh,
    broken_off: Callable[[], bool] = lambda: False,
) -> Validation | None:
    """Goes over the first `sequences` windows (0: all), `batch_size` at a time on each rank. The same result on all ranks.

    broken_off: is asked before every batch, the same answer on all ranks; if so, there is no result.
    """
    device, sums = mesh.device, LossSums()
    experts, pairs = model.settings.moe.experts, max(model.moe_layers - 1, 0)
    counts = torch.zeros(model.moe_layers, experts, dtype=torch.int64, device=device)
    joint = torch.zeros(pairs, experts, experts, dtype=torch.float64, device=device)
    part = DataRank(batch_size, mesh.data_rank, mesh.degrees.data)
    for batch in validation_batches(windows, sequences, part):
        if broken_off():
            return None
        found = evaluate_batch(model, batch, mesh)
        mask = found.labelled
        sums.add(found, tokenizer)
        counts += found.counts
        for pair, (earlier, later) in found.neighbours.items():
            used = torch.bincount(earlier[mask].flatten(), minlength=experts).unsqueeze(1)
            joint[pair] += conditional_routing(earlier, later, experts, mask) * used
    counts, joint = (all_sum(all_sum(x, mesh.ranks.data), mesh.pp) for x in (counts, joint))
    used_E = counts[:pairs].clamp(min=1).unsqueeze(2)
    load = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return Validation(sums.over_ranks(mesh), load.cpu(), (joint / used_E).cpu())


class Evaluated(NamedTuple):
    """This rank's part of one batch, forward only."""

    inputs: Inputs
    labelled: Tensor
    """(T,) bool: which tokens have a label."""
    nats: float
    """Sum of its tokens' cross-entropies; 0 where the last stage of a pipeline isn't."""
    counts: Tensor
    """(L, E) assignments of its labelled tokens, likewise."""
    neighbours: dict[int, tuple[Tensor, Tensor]]
    """The chosen experts (T, k) of MoE layers l and l + 1, by l, where the later one is here."""


class LossSums:
    """Adds up what `Losses` are means of."""

    def __init__(self) -> None:
        self.nats, self.tokens, self.source_bytes = 0.0, 0, 0

    def add(self, found: Evaluated, tokenizer: Tokenizer) -> None:
        self.nats += found.nats
        self.tokens += int(found.labelled.sum())
        self.source_bytes += labelled_bytes(found.inputs, tokenizer)

    def over_ranks(self, mesh: Mesh) -> Losses:
        """The same on all ranks. Collective."""
        nats = all_sum(torch.tensor(self.nats, dtype=torch.float64, device=mesh.device), mesh.pp).item()
        sums = torch.tensor([nats, self.tokens, self.source_bytes], dtype=torch.float64, device=mesh.device)
        nats, tokens, source_bytes = all_sum(sums, mesh.ranks.data).tolist()
        loss = nats / tokens
        return Losses(int(tokens), loss, math.exp(min(loss, 700.0)), nats / math.log(2) / source_bytes)


def evaluate_batch(model: Transformer, batch: Batch, mesh: Mesh) -> Evaluated:
    """batch: this data rank's sequences."""
    inputs = to_inputs(batch, accumulation_dtype(model.dtype), mesh.device, share=0.0)
    inputs = take_part(inputs, mesh.degrees.cp, mesh.cp_rank)
    if model.pipeline is None:
        ce, carry, routing = model.evaluate(inputs)
        neighbours = dict(enumerate(itertools.pairwise(routing)))
    else:
        ce, carry, neighbours = model.pipeline.evaluate(inputs)
    labelled = (inputs.token_weights > 0).flatten()
    return Evaluated(inputs, labelled, ce.item() * batch.label_count, carry.counts, neighbours)


def labelled_bytes(inputs: Inputs, tokenizer: Tokenizer) -> int:
    """Bytes of source text that the labels stand for."""
    labels, tokens = inputs.labels.cpu().numpy(), inputs.tokens.cpu().numpy()
    lengths = tokenizer.count_bytes(tokens, labels)
    return int(np.sum(lengths * (inputs.token_weights > 0).cpu().numpy()))
