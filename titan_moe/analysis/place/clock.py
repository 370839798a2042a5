"""A simulated clock: seconds of a forward pass under expert parallelism, for placements of experts and texts.

The rows that cross ranks and the rows of the busiest rank are counted on a checkpoint's own routing. What they cost
follows from a card's data sheet, as in `titan-moe plan` (estimate/roofline.py). Nothing is measured: a real batch takes longer.

N sequences, L MoE layers, E experts, R ranks.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table

from titan_moe.analysis.place.placement import Counts, Ranks, round_robin, source_by_first_router, source_in_order
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.estimate.counts import count, meta_model
from titan_moe.generate.buckets import WINDOW
from titan_moe.runtime.cards import CARDS_PER_NODE, Card

ROUND_ROBIN, PATH_AWARE, BUCKETS = "round-robin", "path-aware", "path-aware with buckets"
NUMBER = 2  # bytes of a bfloat16
GATE = 4  # bytes of a gate weight, float32, which travels with its row

Rows = npt.NDArray[np.int64]


class Machine(NamedTuple):
    """The ranks, their cards, and how texts are put into batches."""

    name: str
    card: Card
    ranks: int
    nodes: int
    size: int
    """Sequences of a rank in a batch."""


class Work(NamedTuple):
    """What a forward pass computes besides what routing decides."""

    dim: int
    hidden: int
    seq_len: int
    other_flops: float
    """Per token, outside of the routed experts."""
    other_weights: float
    """Numbers in the matrices that this multiplies with."""
    router_flops: float
    """Per token, up to the first router's choice."""


class BatchTime(NamedTuple):
    """One batch, all MoE layers: counts, and the seconds of every part."""

    crossing: float
    """Bytes that cross ranks, there and back, of all ranks together."""
    busiest: float
    """Rows of the busiest rank, mean over layers."""
    exchange: float
    experts: float
    other: float
    buckets: float
    """Up to the first router's choice, once more."""

    @property
    def seconds(self) -> float:
        return self.exchange + self.experts + self.other + self.buckets


def machine_of(name: str, card: Card, ranks: int, nodes: int, size: int) -> Machine:
    """Raises UserError for ranks that can't be spread evenly over nodes, or don't fit."""
    if ranks % nodes or ranks // nodes > CARDS_PER_NODE:
        raise UserError(
            f"--nodes = {nodes}: {ranks} ranks must be spread evenly over nodes, at most {CARDS_PER_NODE} on each"
        )
    return Machine(name, card, ranks, nodes, size)


def work_of(config: Config, vocab_size: int) -> Work:
    """vocab_size: of the model's tokenizer."""
    settings = config.model.model_copy(update={"vocab_size": config.model.vocab_size or vocab_size})
    moe, network = settings.moe, meta_model(settings, torch.bfloat16)
    forward = count(network, config.training.seq_len).flops_per_token / 3  # the backward pass is twice that
    routed_weights = sum(p.numel() for layer in network.moe_modules() for p in layer.experts.parameters())
    routed = 2 * routed_weights * moe.top_k / moe.experts
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1) - routed_weights
    if network.output is not None:
        weights -= network.embedding.numel()
    first = network.blocks()[moe.first_dense_layers]
    before = network.blocks()[: moe.first_dense_layers]
    numbers = sum(p.numel() for block in before for p in block.parameters() if p.dim() > 1)
    assert first.moe is not None
    numbers += sum(p.numel() for p in first.attention.parameters() if p.dim() > 1) + first.moe.router.weight.numel()
    scores = sum(block.attention.score_flops(config.training.seq_len) for block in [*before, first]) / 3
    return Work(
        settings.dim, moe.hidden_dim, config.training.seq_len, forward - routed, weights, 2.0 * numbers + scores
    )


def rows_between(counts: Counts, rank_of: Ranks, source_rank: Ranks, ranks: int) -> Rows:
    """Rows of every layer by (rank of their sequence, rank of their expert): (L, R, R).

    counts: (N, L, E). rank_of: (L, E), by expert. source_rank: (N,), by sequence."""
    rows = np.zeros((counts.shape[1], ranks, ranks), dtype=np.int64)
    for source in range(ranks):
        by_expert = counts[source_rank == source].sum(0)
        for holder in range(ranks):
            rows[:, source, holder] = (by_expert * (rank_of == holder)).sum(1)
    return rows


def exchange_seconds(sent: npt.NDArray[Any], machine: Machine) -> float:
    """Seconds of an all-to-all of `sent` bytes (R, R), from rank to rank: that of its busiest link.

    A card sends and receives at once, to its own node over one link and to other nodes over another."""
    node = np.arange(machine.ranks) // (machine.ranks // machine.nodes)
    near = node[:, None] == node[None]
    other = ~np.eye(machine.ranks, dtype=np.bool_)
    times = []
    for pairs, speed in ((near & other, machine.card.link), (~near, machine.card.network)):
        through = sent * pairs
        times += [through.sum(0).max() / speed, through.sum(1).max() / speed]
    return float(max(times))


def batch_time(rows: Rows, machine: Machine, work: Work, experts_per_rank: float, buckets: bool) -> BatchTime:
    """The time of a batch with these rows (L, R, R). buckets: texts were distributed by their first router."""
    card, tokens = machine.card, machine.size * work.seq_len
    there, back = work.dim * NUMBER + GATE, work.dim * NUMBER
    exchange = sum(exchange_seconds(one * there, machine) + exchange_seconds(one.T * back, machine) for one in rows)
    busiest = rows.sum(1).max(1)
    expert = 3 * work.dim * work.hidden  # numbers in an expert
    reading = experts_per_rank * expert * NUMBER / card.memory
    experts = float(np.maximum(busiest * 2 * expert / card.bfloat16, reading).sum())
    other = max(tokens * work.other_flops / card.bfloat16, work.other_weights * NUMBER / card.memory)
    crossing = float(rows.sum() - np.trace(rows, axis1=1, axis2=2).sum()) * (there + back)
    again = tokens * work.router_flops / card.bfloat16 if buckets else 0.0
    return BatchTime(crossing, float(busiest.mean()), float(exchange), experts, other, again)


def batches_of(source_rank: Ranks, machine: Machine) -> list[npt.NDArray[np.int64]]:
    """The sequences of every full batch: the next `size` of each rank. What is left over is not in any."""
    own = [np.flatnonzero(source_rank == rank) for rank in range(machine.ranks)]
    full = min(map(len, own)) // machine.size
    return [np.concatenate([one[n * machine.size : (n + 1) * machine.size] for one in own]) for n in range(full)]


def sources_in_windows(counts: Counts, rank_of: Ranks, machine: Machine) -> Ranks:
    """The rank of every sequence (N,) by its first router, as `titan-moe eval --placement` distributes texts: some batches at
    a time."""
    window = WINDOW * machine.ranks * machine.size
    starts = range(0, len(counts), window)
    return np.concatenate([source_by_first_router(counts[start : start + window], rank_of) for start in starts])


def clock(counts: Counts, rank_of: Ranks, machine: Machine, work: Work) -> dict[str, list[BatchTime]]:
    """The batches of a text by arm: round-robin, path-aware, path-aware with buckets. counts: (N, L, E). Raises UserError."""
    sequences, layers, experts = counts.shape
    in_turn = source_in_order(sequences, machine.ranks)
    arms = {
        ROUND_ROBIN: (round_robin(layers, experts, machine.ranks), in_turn),
        PATH_AWARE: (rank_of, in_turn),
        BUCKETS: (rank_of, sources_in_windows(counts, rank_of, machine)),
    }
    times = {}
    for name, (holders, source_rank) in arms.items():
        times[name] = [
            batch_time(
                rows_between(counts[batch], holders, source_rank[batch], machine.ranks),
                machine,
                work,
                experts / machine.ranks,
                name == BUCKETS,
            )
            for batch in batches_of(source_rank, machine)
        ]
        if not times[name]:
            raise UserError(
                f"--batch-size = {machine.size}: the held-out half of the text has {sequences} sequences, too few for a "
                f"batch of {machine.ranks} ranks"
            )
    return times


def means(times: list[BatchTime]) -> dict[str, float]:
    """Means over batches, by field, and of the seconds in all."""
    fields = {name: float(np.mean([getattr(one, name) for one in times])) for name in BatchTime._fields}
    return fields | {"seconds": float(np.mean([one.seconds for one in times]))}


def clock_table(times: dict[str, list[BatchTime]], machine: Machine, work: Work) -> Table:
    cards = f"{machine.ranks} cards on {machine.nodes} node{'s' * (machine.nodes > 1)}"
    rows = means(times[ROUND_ROBIN])
    table = Table(
        title=f"simulated forward pass by the data sheet of {machine.name}: {cards}, {machine.size} x {work.seq_len} tokens a "
        "rank and batch (nothing measured)"
    )
    titles = ("batches", "MiB between ranks", "busiest rank's rows", "all-to-all us", "experts us", "other us")
    for title in ("arm", *titles, "a batch us", "sequences/s", "speed"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    for name, batches in times.items():
        mean = means(batches)
        per_second = machine.ranks * machine.size / mean["seconds"]
        parts = [mean["exchange"], mean["experts"], mean["other"] + mean["buckets"], mean["seconds"]]
        table.add_row(
            name,
            str(len(batches)),
            f"{mean['crossing'] / 2**20:.3f}",
            f"{mean['busiest']:.0f}",
            *(f"{1e6 * part:.4g}" for part in parts),
            f"{per_second:,.0f}",
            f"{rows['seconds'] / mean['seconds']:.3f}x",
        )
    return table


def assumptions(machine: Machine) -> list[str]:
    """What the clock takes for granted, one sentence a line."""
    card, per_node = machine.card, machine.ranks // machine.nodes
    lines = [
        f"{machine.name}: {card.bfloat16 / 1e12:g} TFLOP/s in bfloat16, memory {card.memory / 1e9:g} GB/s, "
        f"{card.link / 1e9:g} GB/s per direction to cards of the node, {card.network / 1e9:g} GB/s to other nodes",
        f"ranks 0 to {per_node - 1} are on the first node; the placement does not know of nodes",
        "an all-to-all takes as long as its busiest link, each rank sending and receiving at once; no latency",
        "a layer's all-to-alls and experts follow one another, and its slowest rank holds up all",
        "activations and weights in bfloat16, a float32 gate weight with each row; each weight is read once",
        "whole sequences at once, as in scoring or at the start of generation; new tokens one by one are not simulated",
        f"with buckets: {WINDOW} batches are distributed together, and attention up to the first router runs twice",
        "the half of the text that the placement was not fitted to, its sequences in a fixed random order; full batches only",
    ]
    return [f"  assumed: {line}" for line in lines]
