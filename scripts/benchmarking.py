"""Shared by the benchmarks: the paper's model sizes, an input, timing, and a confidence interval of a median."""

import math
import time
from collections.abc import Callable

import torch

from titan_moe.config.tables import Model, MoE
from titan_moe.model.transformer import Inputs

VOCABULARY = 32000
GEOMETRY = {
    "small": Model(dim=576, heads=9, layers=12, moe=MoE(experts=16, top_k=2, hidden_dim=1104)),
    "medium": Model(dim=512, heads=8, layers=4, moe=MoE(experts=64, top_k=4, hidden_dim=672)),
    "large": Model(dim=768, heads=12, layers=2, moe=MoE(experts=96, top_k=6, hidden_dim=1744)),
}


def inputs_of(sequences: int, seq: int) -> Inputs:
    """A batch of random tokens, all labelled, in one document."""
    tokens = torch.randint(0, VOCABULARY, (sequences, seq), generator=torch.Generator().manual_seed(0))
    weights = torch.full(tokens.shape, 1.0 / tokens.numel())
    positions = torch.arange(seq).expand_as(tokens)
    labels, documents = tokens.roll(-1, 1), torch.zeros_like(tokens)
    return Inputs(
        tokens, labels, documents, positions, weights, torch.arange(sequences), torch.tensor(1), torch.arange(seq)
    )


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the median from order statistics (normal approximation of the binomial)."""
    n = len(values)
    half_width = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - half_width)), min(n - 1, math.ceil(n / 2 + half_width))
    return sorted(values)[low], sorted(values)[high]
