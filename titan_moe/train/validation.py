"""Perplexity, bits per byte and routing on the validation text."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titan_moe.data.loader import Batch, DataRank, Windows, validation_batches
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import NonFiniteError, UserError
from titan_moe.model.transformer import Inputs
from titan_moe.parallel.context import context_shard
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.runner import Runner
from titan_moe.train.inputs import to_inputs
from torchtitan_ext.collectives import all_sum
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.metrics import conditional_routing


class Losses(NamedTuple):
    tokens: int
    """Number of labelled tokens."""
    loss: float
    """Mean cross-entropy in nats per token."""
    perplexity: float
    bits_per_byte: float
    """Bits per byte of source text."""


class Validation(NamedTuple):
    losses: Losses
    load: Tensor
    """(L, E) fraction of each MoE layer's assignments that go to each expert."""
    cond: Tensor
    """(L - 1, E, E), P(expert v in the next MoE layer | expert e in this one)."""


@torch.no_grad()
def validate(
    runner: Runner,
    windows: Windows,
    tokenizer: Tokenizer,
    sequences: int,
    batch_size: int,
    mesh: Mesh,
    interrupted: Callable[[], bool] = lambda: False,
) -> Validation | None:
    """Evaluates the first `sequences` windows (0: all), `batch_size` at a time per rank. All ranks get the same result.

    interrupted: called before every batch, must be equal on all ranks; if true, validation stops and returns None.
    """
    model, device, sums = runner.model, mesh.device, LossSums()
    experts, pairs = model.settings.moe.experts, max(model.moe_layers - 1, 0)
    counts = torch.zeros(model.moe_layers, experts, dtype=torch.int64, device=device)
    joint = torch.zeros(pairs, experts, experts, dtype=torch.float64, device=device)
    part = DataRank(batch_size, mesh.data_rank, mesh.degrees.data)
    for batch in validation_batches(windows, sequences, part):
        if interrupted():
            return None
        result = evaluate_batch(runner, batch, mesh)
        mask = result.labelled
        sums.add(result, tokenizer)
        counts += result.counts
        for pair, (earlier, later) in result.routing_pairs.items():
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
    """Sum of the tokens' cross-entropies; 0 on a rank without the last pipeline stage."""
    counts: Tensor
    """(L, E) assignments of labelled tokens; 0 on a rank without the last pipeline stage."""
    routing_pairs: dict[int, tuple[Tensor, Tensor]]
    """See `Evaluation`."""


class LossSums:
    """The sums over batches that `Losses` are computed from."""

    def __init__(self) -> None:
        self.nats, self.tokens, self.source_bytes = 0.0, 0, 0

    def add(self, batch: Evaluated, tokenizer: Tokenizer) -> None:
        self.nats += batch.nats
        self.tokens += int(batch.labelled.sum())
        self.source_bytes += labelled_bytes(batch.inputs, tokenizer)

    def over_ranks(self, mesh: Mesh) -> Losses:
        """Losses of all ranks' batches, equal on all ranks; a collective. Raises, on all of them, NonFiniteError, and
        UserError for text without a byte."""
        nats = all_sum(torch.tensor(self.nats, dtype=torch.float64, device=mesh.device), mesh.pp).item()
        sums = torch.tensor([nats, self.tokens, self.source_bytes], dtype=torch.float64, device=mesh.device)
        nats, tokens, source_bytes = all_sum(sums, mesh.ranks.data).tolist()
        if source_bytes == 0:
            raise UserError(
                "data.corpus: the text to evaluate has not one byte, only empty documents or unknown characters; remove "
                "them, or raise data.validation_fraction"
            )
        loss = nats / tokens
        if not math.isfinite(loss):
            raise NonFiniteError("the cross-entropy is not finite")
        return Losses(int(tokens), loss, math.exp(min(loss, 700.0)), nats / math.log(2) / source_bytes)


def evaluate_batch(runner: Runner, batch: Batch, mesh: Mesh) -> Evaluated:
    """Evaluates this rank's sequences of a batch."""
    inputs = to_inputs(batch, accumulation_dtype(runner.model.dtype), mesh.device, fraction=0.0)
    inputs = context_shard(inputs, mesh.degrees.cp, mesh.cp_rank)
    ce, carry, routing_pairs = runner.evaluate(inputs)
    labelled = (inputs.token_weights > 0).flatten()
    return Evaluated(inputs, labelled, ce.item() * batch.label_count, carry.counts, routing_pairs)


def labelled_bytes(inputs: Inputs, tokenizer: Tokenizer) -> int:
    """Bytes of source text that the labels decode to."""
    labels, tokens = inputs.labels.cpu().numpy(), inputs.tokens.cpu().numpy()
    lengths = tokenizer.count_bytes(tokens, labels)
    return int(np.sum(lengths * (inputs.token_weights > 0).cpu().numpy()))
