"""What travels through the network beside the hidden states: every block is `(h, carry) -> (h, carry)`.

A regularizer is an ordinary output of an ordinary forward pass. Nothing is stored on modules or injected by hooks, so
recomputing a block counts no token twice, compilers see pure functions, and a pipeline stage hands the carry on like any
other activation.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Carry(NamedTuple):
    """N terms, T tokens, L MoE layers, E experts."""

    terms: Tensor
    """(N,) running sum over layers of every enabled term, at least float32; has a gradient."""
    previous: Tensor
    """(T, n), what terms carry from the previous MoE layer (cp: its source mass or its scores); has a gradient."""
    term_sums: Tensor
    """(L, n), each layer's weighted sums over this rank's tokens, for terms that are formed once per microbatch, after the last
    layer (lb of scope `global`: its scores); has a gradient."""
    counts: Tensor
    """(L, E) int64, assignments of labelled tokens to experts; no gradient."""
    sums: Tensor
    """(L, M) weighted sums over tokens of the measures `Terms.measures`; no gradient."""


def empty_carry(
    terms: int,
    tokens: int,
    layers: int,
    experts: int,
    dtype: torch.dtype,
    device: torch.device,
    previous_width: int,
    measures: int,
    term_sums: int = 0,
) -> Carry:
    """The carry that enters the first block. dtype: at least float32. previous_width, measures, term_sums: columns."""
    return Carry(
        terms=torch.zeros(terms, dtype=dtype, device=device),
        previous=torch.zeros(tokens, previous_width, dtype=dtype, device=device),
        term_sums=torch.zeros(layers, term_sums, dtype=dtype, device=device),
        counts=torch.zeros(layers, experts, dtype=torch.int64, device=device),
        sums=torch.zeros(layers, measures, dtype=dtype, device=device),
    )


def add_carry(total: Carry | None, carry: Carry) -> Carry:
    """The sum over micro-batches of what a step reports, without gradients. Sums, never means: weights are global."""
    detached = Carry(*(tensor.detach() for tensor in carry))
    if total is None:
        return detached
    return Carry(
        terms=total.terms + detached.terms,
        previous=total.previous,
        term_sums=total.term_sums,
        counts=total.counts + detached.counts,
        sums=total.sums + detached.sums,
    )
