"""`titan-moe place`: an order of a checkpoint's experts in which each rank's experts are contiguous."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from titan_moe.analysis.inspect.inspection import Options, model_of
from titan_moe.analysis.place.clock import BatchTime, Machine, Work, assumptions, clock, clock_table, means, work_of
from titan_moe.analysis.place.placement import (
    Counts,
    Ranks,
    Traffic,
    in_order,
    order_by_paths,
    order_of,
    place,
    round_robin,
    source_by_first_router,
    source_in_order,
    traffic,
)
from titan_moe.analysis.processes import print_table
from titan_moe.checkpoint.expert_order import write_order
from titan_moe.config.tables import Config
from titan_moe.data.loader import permuted
from titan_moe.parallel.mesh import Mesh
from torchtitan_ext.metrics import match_experts


class Placement(NamedTuple):
    order: Ranks
    """(L, E): the old expert index at each new index."""
    traffic: dict[str, dict[str, Traffic]]
    """By placement of experts and sequences, then by text: the one it was fitted to, and another."""
    bytes_per_row: int
    """Bytes sent for a routed row on another rank: dispatch and combine, forward only."""
    rows: int
    """Routed rows of one sequence, all layers."""
    times: dict[str, list[BatchTime]]
    """The batches of the held-out half by arm, on a machine; empty without one."""
    work: Work


def for_ranks(
    checkpoint: Path, config: Config, mesh: Mesh, options: Options, ranks: int, machine: Machine | None = None
) -> Placement:
    """Fits a placement to every second sequence of the text and measures it on both halves. Raises UserError."""
    inspected = model_of(checkpoint, config, mesh, options)
    tally = inspected.tally(sequences=inspected.sequences)
    inspected.load(checkpoint)
    inspected.run_on_text(tally)
    counts: Counts = tally.sequence_load.cpu().numpy()
    fitted, other = counts[::2], counts[1::2]
    rank_of = place(fitted, tally.joint.cpu().numpy(), ranks)
    layers, experts = rank_of.shape
    interleaved = round_robin(layers, experts, ranks)
    names: dict[str, tuple[Ranks, bool]] = {
        "round-robin, sequences as they come": (interleaved, False),
        "in order, sequences by first router": (in_order(layers, experts, ranks), True),
        "round-robin, sequences by first router": (interleaved, True),
        "path-aware, sequences by first router": (rank_of, True),
    }
    traffic = {name: compare(fitted, other, *how, ranks) for name, how in names.items()}
    size = 2 * config.model.dim * inspected.model.dtype.itemsize
    rows = layers * config.model.moe.top_k * config.training.seq_len
    work = work_of(config, inspected.prepared.tokenizer.vocab_size)
    # In a fixed random order: the text has its domains one after another, and a server's requests are mixed.
    mixed = other[permuted(np.arange(len(other), dtype=np.int64), len(other), key=0)]
    times = clock(mixed, rank_of, machine, work) if machine else {}
    return Placement(order_of(rank_of), traffic, size, rows, times, work)


def compare(fitted: Counts, other: Counts, rank_of: Ranks, by_router: bool, ranks: int) -> dict[str, Traffic]:
    measured = {}
    for name, counts in (("fitted", fitted), ("other", other)):
        source_rank = source_by_first_router(counts, rank_of) if by_router else source_in_order(len(counts), ranks)
        measured[name] = traffic(counts, rank_of, source_rank)
    return measured


def by_paths(checkpoint: Path, config: Config, mesh: Mesh, options: Options) -> Ranks:
    """The order (L, E) in which an expert has the same index as its match in the layer before, by the best one-to-one
    matching of consecutive layers."""
    inspected = model_of(checkpoint, config, mesh, options)
    tally = inspected.tally()
    inspected.load(checkpoint)
    inspected.run_on_text(tally)
    matchings = [match_experts(pair)[0].tolist() for pair in tally.first_joint.cpu()]
    return order_by_paths(matchings) if matchings else np.arange(config.model.moe.experts)[None]


def table(placement: Placement, ranks: int, batch: int) -> Table:
    """Traffic of every placement as a table. batch: sequences per step."""
    result = Table(title=f"{ranks} ranks: fraction of routed rows sent to another rank")
    columns = (
        "placement",
        "fitted text",
        "held-out text",
        "by layer (held-out)",
        "MiB per step",
        "busiest rank / mean",
    )
    for column in columns:
        result.add_column(column, justify="left" if column == "placement" else "right")
    for name, measured in placement.traffic.items():
        other = measured["other"]
        mib = other.share * placement.rows * batch * placement.bytes_per_row / 2**20
        layers = " ".join(f"{share:.2f}" for share in other.by_layer)
        result.add_row(
            name, f"{measured['fitted'].share:.3f}", f"{other.share:.3f}", layers, f"{mib:.1f}", f"{other.load:.2f}"
        )
    return result


def facts(placement: Placement) -> dict[str, Any]:
    """Traffic of every placement, for the JSON file."""
    return {
        name: {text: one._asdict() for text, one in measured.items()} for name, measured in placement.traffic.items()
    }


def write_placement(
    checkpoint: Path,
    config: Config,
    mesh: Mesh,
    options: Options,
    ranks: int | None,
    output: Path | None,
    machine: Machine | None = None,
) -> None:
    """Writes an order of experts as JSON: for `ranks` ranks, whose traffic is printed too, or by paths when it is None.

    output: the file; None: one in the run directory. machine: of as many ranks; prints its simulated time. Raises UserError.
    """
    name = f"order-{ranks}-ranks.json" if ranks else "order-by-paths.json"
    path = output or checkpoint.parent.parent / name
    placement = for_ranks(checkpoint, config, mesh, options, ranks, machine) if ranks else None
    order = placement.order if placement else by_paths(checkpoint, config, mesh, options)
    if not mesh.first:
        return
    if placement and ranks:
        print_table(table(placement, ranks, config.training.batch_size))
        if machine:
            print_table(clock_table(placement.times, machine, placement.work))
            print("\n".join(assumptions(machine)))
    more: dict[str, Any] = {"ranks": ranks, "traffic": facts(placement)} if placement else {"traffic": {}}
    if placement and machine:
        more["clock"] = {arm: means(times) for arm, times in placement.times.items()}
    write_order(path, order, checkpoint=str(checkpoint), **more)
    print(path)
