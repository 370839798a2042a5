"""`titan-moe place`: an order of a checkpoint's experts in which neighbours belong together."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from titan_moe.analysis.inspect.inspection import Options, Watched
from titan_moe.analysis.place.placement import (
    Counts,
    Ranks,
    Traffic,
    homes_by_first_router,
    homes_in_order,
    in_order,
    order_by_paths,
    order_of,
    place,
    round_robin,
    traffic,
)
from titan_moe.analysis.processes import print_table
from titan_moe.checkpoint.expert_order import write_order
from titan_moe.config.tables import Config
from titan_moe.parallel.mesh import Mesh
from torchtitan_ext.metrics import match_experts


class Placement(NamedTuple):
    order: Ranks
    """(L, E), new place to old number."""
    arms: dict[str, dict[str, Traffic]]
    """By placement and way of finding homes: on the text that it was fitted on, and on other text."""
    bytes_per_row: int
    """That a row which crosses ranks takes, there and back, forward only."""
    rows: int
    """Routed rows of a sequence, all layers."""


def for_ranks(checkpoint: Path, config: Config, mesh: Mesh, options: Options, ranks: int) -> Placement:
    """Fits a placement on every other sequence of the text, and compares it on both halves. Raises UserError."""
    watched = Watched(config, mesh, options)
    tally = watched.tally(sequences=watched.sequences)
    watched.load(checkpoint)
    watched.go_through(tally)
    counts: Counts = tally.sequence_load.cpu().numpy()
    fitted, other = counts[::2], counts[1::2]
    rank_of = place(fitted, tally.joint.cpu().numpy(), ranks)
    layers, experts = rank_of.shape
    dealt = round_robin(layers, experts, ranks)
    names: dict[str, tuple[Ranks, bool]] = {
        "round-robin, sequences as they come": (dealt, False),
        "in order, sequences by first router": (in_order(layers, experts, ranks), True),
        "round-robin, sequences by first router": (dealt, True),
        "path-aware, sequences by first router": (rank_of, True),
    }
    arms = {name: compare(fitted, other, *how, ranks) for name, how in names.items()}
    size = 2 * config.model.dim * watched.model.dtype.itemsize
    rows = layers * config.model.moe.top_k * config.training.seq_len
    return Placement(order_of(rank_of), arms, size, rows)


def compare(fitted: Counts, other: Counts, rank_of: Ranks, bucketed: bool, ranks: int) -> dict[str, Traffic]:
    found = {}
    for name, counts in (("fitted", fitted), ("other", other)):
        homes = homes_by_first_router(counts, rank_of) if bucketed else homes_in_order(len(counts), ranks)
        found[name] = traffic(counts, rank_of, homes)
    return found


def by_paths(checkpoint: Path, config: Config, mesh: Mesh, options: Options) -> Ranks:
    """The order in which the best one-to-one matching of neighbouring layers keeps an expert's number."""
    watched = Watched(config, mesh, options)
    tally = watched.tally()
    watched.load(checkpoint)
    watched.go_through(tally)
    matchings = [match_experts(pair)[0].tolist() for pair in tally.first_joint.cpu()]
    return order_by_paths(matchings) if matchings else np.arange(config.model.moe.experts)[None]


def table(found: Placement, ranks: int, batch: int) -> Table:
    """What the placements make of the text. batch: sequences of a step."""
    result = Table(title=f"{ranks} ranks: share of routed rows that cross ranks")
    columns = ("placement", "fitted text", "other text", "by layer (other text)", "MiB per step", "busiest rank / mean")
    for column in columns:
        result.add_column(column, justify="left" if column == "placement" else "right")
    for name, arm in found.arms.items():
        other = arm["other"]
        mib = other.share * found.rows * batch * found.bytes_per_row / 2**20
        layers = " ".join(f"{share:.2f}" for share in other.by_layer)
        result.add_row(
            name, f"{arm['fitted'].share:.3f}", f"{other.share:.3f}", layers, f"{mib:.1f}", f"{other.load:.2f}"
        )
    return result


def facts(found: Placement) -> dict[str, Any]:
    """For the file."""
    return {name: {text: one._asdict() for text, one in arm.items()} for name, arm in found.arms.items()}


def write_placement(
    checkpoint: Path, config: Config, mesh: Mesh, options: Options, ranks: int | None, output: Path | None
) -> None:
    """Writes an order of experts for so many ranks (None: by paths) as JSON, and prints the traffic that it saves.

    output: the file; None: one in the run directory. Raises UserError.
    """
    name = f"order-{ranks}-ranks.json" if ranks else "order-by-paths.json"
    path = output or checkpoint.parent.parent / name
    placement = for_ranks(checkpoint, config, mesh, options, ranks) if ranks else None
    order = placement.order if placement else by_paths(checkpoint, config, mesh, options)
    if not mesh.first:
        return
    if placement and ranks:
        print_table(table(placement, ranks, config.training.batch_size))
    write_order(path, order, checkpoint=str(checkpoint), traffic=facts(placement) if placement else {})
    print(path)
