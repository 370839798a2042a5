"""Path-aware placement: which rank holds which expert, so that fewer routed rows are sent between ranks.

The tokens of a sequence start on its source rank; a routed row crosses ranks when its expert is on another rank. Every
rank holds the same number of experts of each layer. A sequence goes to the rank whose experts its first router chose
most; an expert goes to the rank that most of its rows come from.

N sequences, L MoE layers, E experts, R ranks. Source: Hu et al., appendix F, which names the parts but gives no
algorithm. Here METIS partitions the graph of cross-layer co-activations; then experts and source ranks are assigned in
turn, each assignment optimal given the other.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from titan_moe.errors import UserError
from titan_moe.generate.buckets import assign_texts

ROUNDS = 20

Counts = npt.NDArray[np.int64]
Ranks = npt.NDArray[np.int64]


class Traffic(NamedTuple):
    """Rows sent between ranks for a placement and a text."""

    share: float
    """Fraction of all routed rows that cross ranks."""
    by_layer: list[float]
    """The same fraction, layer by layer."""
    load: float
    """Rows of the busiest rank divided by the mean over ranks; mean over layers."""


def in_order(layers: int, experts: int, ranks: int) -> Ranks:
    """Contiguous blocks of experts, as expert parallelism places them: the rank of every expert, (L, E)."""
    return np.tile(np.arange(experts) // (experts // ranks), (layers, 1))


def round_robin(layers: int, experts: int, ranks: int) -> Ranks:
    """Expert e on rank e mod R: (L, E)."""
    return np.tile(np.arange(experts) % ranks, (layers, 1))


def traffic(counts: Counts, rank_of: Ranks, source_rank: Ranks) -> Traffic:
    """counts: (N, L, E) rows of each sequence and expert. rank_of: (L, E), by expert. source_rank: (N,), by
    sequence."""
    is_local = rank_of[None] == source_rank[:, None, None]
    total = counts.sum((0, 2)).clip(min=1)
    crossing = 1.0 - (counts * is_local).sum((0, 2)) / total
    rows = counts.sum(0)
    ranks = int(rank_of.max()) + 1
    loads = np.stack([(rows * (rank_of == rank)).sum(1) for rank in range(ranks)], axis=1)
    busiest = loads.max(1) / loads.mean(1).clip(min=1e-30)
    share = float((crossing * total).sum() / total.sum())
    return Traffic(share, crossing.tolist(), float(busiest.mean()))


def source_in_order(sequences: int, ranks: int) -> Ranks:
    """Sequence n on rank n mod R: (N,)."""
    return np.arange(sequences) % ranks


def source_by_first_router(counts: Counts, rank_of: Ranks) -> Ranks:
    """Sequences to the ranks whose experts their first router chose most: (N,).

    Ranks get equally many sequences, or one more. The assignment with the most local rows, a transport problem."""
    ranks = int(rank_of.max()) + 1
    gain = np.stack([(counts[:, 0] * (rank_of[0] == rank)).sum(1) for rank in range(ranks)], axis=1)
    return assign_texts(gain)


def assign(gain: npt.NDArray[Any]) -> Ranks:
    """The assignment of experts to ranks with the largest total gain, equally many to each: gain (E, R) -> (E,)."""
    experts, ranks = gain.shape
    size = experts // ranks
    rows, columns = linear_sum_assignment(np.repeat(gain, size, axis=1), maximize=True)
    rank = np.empty(experts, dtype=np.int64)
    rank[rows] = columns // size
    return rank


def cut_graph(joint: npt.NDArray[Any], ranks: int) -> Ranks:
    """An initial placement by graph partitioning: joint (L - 1, E, E) -> (L, E).

    A node is an expert of a layer, an edge's weight how often tokens go from one expert to the other in the next layer.
    METIS partitions the graph; then each layer's experts are assigned to ranks in equal numbers."""
    import pymetis

    pairs, experts, _ = joint.shape
    nodes = (pairs + 1) * experts
    weights = np.zeros((nodes, nodes), dtype=np.int64)
    for pair in range(pairs):
        a, b = pair * experts, (pair + 1) * experts
        weights[a : a + experts, b : b + experts] = joint[pair]
        weights[b : b + experts, a : a + experts] = joint[pair].T
    if weights.max() > 1 << 20:  # METIS has 32-bit weights
        weights = weights * (1 << 20) // weights.max()
    starts = np.concatenate([[0], np.cumsum((weights > 0).sum(1))])
    neighbours = np.nonzero(weights)[1]
    edges = weights[weights > 0]
    graph = pymetis.CSRAdjacency(starts, neighbours)
    _, parts = pymetis.part_graph(ranks, graph, eweights=edges)
    in_part = np.eye(ranks)[np.array(parts)]
    attraction = weights @ in_part  # (L E, R): total weight of a node's edges into each part
    return np.stack([assign(attraction[layer * experts : (layer + 1) * experts]) for layer in range(pairs + 1)])


def place(counts: Counts, joint: npt.NDArray[Any], ranks: int) -> Ranks:
    """The placement (L, E) with the fewest crossing rows of those tried, round-robin among them. Raises UserError."""
    _, layers, experts = counts.shape
    if experts % ranks or ranks < 2:
        raise UserError(f"--ranks = {ranks}: must divide model.moe.experts = {experts}, and be 2 or more")
    if counts.shape[0] < ranks:
        raise UserError(f"--ranks = {ranks}: the text has only {counts.shape[0]} sequences")
    starts = [round_robin(layers, experts, ranks), in_order(layers, experts, ranks)]
    if layers > 1:
        starts.append(cut_graph(joint, ranks))
    best, fewest = starts[0], np.inf
    for rank_of in starts:
        for _ in range(ROUNDS):
            source_rank = source_by_first_router(counts, rank_of)
            share = traffic(counts, rank_of, source_rank).share
            if share >= fewest:
                break
            best, fewest = rank_of, share
            rows_from = np.stack([counts[source_rank == rank].sum(0) for rank in range(ranks)], axis=2)
            rank_of = np.stack([assign(gain) for gain in rows_from])
    return best


def order_of(rank_of: Ranks) -> Ranks:
    """The order in which each rank's experts are contiguous: (L, E), the old expert index at each new index."""
    return np.argsort(rank_of, axis=1, kind="stable")


def order_by_paths(matchings: list[list[int]]) -> Ranks:
    """The order in which expert e of a layer is matched with expert e of the next: the matchings composed, (L, E)."""
    orders = [np.arange(len(matchings[0]))]
    for matching in matchings:
        orders.append(np.array(matching)[orders[-1]])
    return np.stack(orders)
