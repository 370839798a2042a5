"""Which rank should hold which expert, so that tokens travel less: path-aware placement.

Every sequence has a home rank; a routed row crosses ranks when its expert is elsewhere. Each rank holds as many experts of
every layer. Sequences are sent home by their first router's choice (a bucket is a rank), experts by where their rows come from.

N sequences, L MoE layers, E experts, R ranks. Source: Hu et al., appendix F, which names the parts but no algorithm: here the
cross-layer co-activation graph is cut by METIS, then experts and homes are assigned in turn, each step the best there is.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import coo_array

from titan_moe.errors import UserError

ROUNDS = 20

Counts = npt.NDArray[np.int64]
Ranks = npt.NDArray[np.int64]


class Traffic(NamedTuple):
    """What a placement makes of a text."""

    share: float
    """Of all routed rows, those that cross ranks."""
    by_layer: list[float]
    load: float
    """The busiest rank's rows over the mean, mean over layers."""


def in_order(layers: int, experts: int, ranks: int) -> Ranks:
    """Blocks of experts in their own order: what expert parallelism does. (L, E) rank of every expert."""
    return np.tile(np.arange(experts) // (experts // ranks), (layers, 1))


def round_robin(layers: int, experts: int, ranks: int) -> Ranks:
    """Expert e on rank e mod R."""
    return np.tile(np.arange(experts) % ranks, (layers, 1))


def traffic(counts: Counts, rank_of: Ranks, homes: Ranks) -> Traffic:
    """counts: (N, L, E) rows of each sequence. rank_of: (L, E). homes: (N,)."""
    at_home = rank_of[None] == homes[:, None, None]
    total = counts.sum((0, 2)).clip(min=1)
    crossing = 1.0 - (counts * at_home).sum((0, 2)) / total
    rows = counts.sum(0)
    ranks = int(rank_of.max()) + 1
    loads = np.stack([(rows * (rank_of == rank)).sum(1) for rank in range(ranks)], axis=1)
    busiest = loads.max(1) / loads.mean(1).clip(min=1e-30)
    share = float((crossing * total).sum() / total.sum())
    return Traffic(share, crossing.tolist(), float(busiest.mean()))


def homes_in_order(sequences: int, ranks: int) -> Ranks:
    """Sequences dealt to ranks as they come."""
    return np.arange(sequences) % ranks


def homes_by_first_router(counts: Counts, rank_of: Ranks) -> Ranks:
    """Each sequence to the rank whose experts its first router chose most, as many to each rank (one more to some): (N,).

    The best such assignment, a transport problem."""
    sequences, ranks = counts.shape[0], int(rank_of.max()) + 1
    gain = np.stack([(counts[:, 0] * (rank_of[0] == rank)).sum(1) for rank in range(ranks)], axis=1)
    variables = np.arange(sequences * ranks)
    one_home = coo_array((np.ones(len(variables)), (variables // ranks, variables)))
    in_bucket = coo_array((np.ones(len(variables)), (variables % ranks, variables)))
    limits = [LinearConstraint(one_home, 1, 1), LinearConstraint(in_bucket, sequences // ranks, -(-sequences // ranks))]
    found = milp(-gain.reshape(-1).astype(np.float64), constraints=limits, bounds=(0, 1))  # whole by itself
    assert found.x is not None, found.message
    homes: Ranks = found.x.reshape(sequences, ranks).argmax(1)
    return homes


def assign(gain: npt.NDArray[Any]) -> Ranks:
    """The best assignment of experts to ranks, as many to each: gain (E, R) -> (E,)."""
    experts, ranks = gain.shape
    size = experts // ranks
    rows, columns = linear_sum_assignment(np.repeat(gain, size, axis=1), maximize=True)
    found = np.empty(experts, dtype=np.int64)
    found[rows] = columns // size
    return found


def cut_graph(joint: npt.NDArray[Any], ranks: int) -> Ranks:
    """A first placement: METIS cuts the graph whose nodes are the experts of all layers and whose edges are how often one
    follows another; then every rank gets its number of each layer's experts. joint: (L - 1, E, E) -> (L, E)."""
    import pymetis

    pairs, experts, _ = joint.shape
    nodes = (pairs + 1) * experts
    weights = np.zeros((nodes, nodes), dtype=np.int64)
    for pair in range(pairs):
        a, b = pair * experts, (pair + 1) * experts
        weights[a : a + experts, b : b + experts] = joint[pair]
        weights[b : b + experts, a : a + experts] = joint[pair].T
    if weights.max() > 1 << 20:  # METIS counts in 32 bits
        weights = weights * (1 << 20) // weights.max()
    starts = np.concatenate([[0], np.cumsum((weights > 0).sum(1))])
    neighbours = np.nonzero(weights)[1]
    edges = weights[weights > 0]
    graph = pymetis.CSRAdjacency(starts, neighbours)
    _, parts = pymetis.part_graph(ranks, graph, eweights=edges)
    belongs = np.eye(ranks)[np.array(parts)]
    drawn = weights @ belongs  # how strongly each node is drawn to each part
    return np.stack([assign(drawn[layer * experts : (layer + 1) * experts]) for layer in range(pairs + 1)])


def place(counts: Counts, joint: npt.NDArray[Any], ranks: int) -> Ranks:
    """The placement (L, E) with the fewest crossing rows that was found; never more than round-robin's. Raises UserError."""
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
            homes = homes_by_first_router(counts, rank_of)
            share = traffic(counts, rank_of, homes).share
            if share >= fewest:
                break
            best, fewest = rank_of, share
            from_home = np.stack([counts[homes == rank].sum(0) for rank in range(ranks)], axis=2)
            rank_of = np.stack([assign(gain) for gain in from_home])
    return best


def order_of(rank_of: Ranks) -> Ranks:
    """The order of experts in which contiguous blocks are ranks: (L, E), new place to old number."""
    return np.argsort(rank_of, axis=1, kind="stable")


def order_by_paths(matchings: list[list[int]]) -> Ranks:
    """The order in which expert e of a layer is followed by expert e of the next: layers chained by their matchings."""
    orders = [np.arange(len(matchings[0]))]
    for matching in matchings:
        orders.append(np.array(matching)[orders[-1]])
    return np.stack(orders)
