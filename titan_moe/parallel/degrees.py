"""How many ranks each dimension has, checked before anything starts. Nothing here imports torch."""

from collections.abc import Callable
from typing import NamedTuple

from titan_moe.config.tables import Config, Parallelism
from titan_moe.errors import UserError

Origin = Callable[[str], str]  # key -> "file: key", for error messages


class Degrees(NamedTuple):
    """World = dp_replicate * dp_shard * cp, in this order, the last one fastest; ep ranks are neighbours in dp_shard * cp."""

    dp_replicate: int
    dp_shard: int
    cp: int
    ep: int

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp

    @property
    def data(self) -> int:
        """Ranks, or groups of context-parallel ranks, with sequences of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks that parameters other than the experts' are sharded over."""
        return self.dp_shard * self.cp

    @property
    def expert_fsdp(self) -> int:
        """Ranks that each expert's parameters are sharded over, beside ep."""
        return self.fsdp // self.ep


def resolve(parallelism: Parallelism, world: int, origin: Origin) -> Degrees:
    """The degrees for so many processes. Raises UserError for a combination that can't be, and says which numbers could."""
    fixed = parallelism.dp_replicate * parallelism.cp
    shard = parallelism.dp_shard
    if shard in (-1, 0):
        if world % fixed:
            raise UserError(
                f"{origin('parallelism')}: {world} processes are not a multiple of dp_replicate * cp = {fixed}; "
                f"{_numbers([n for n in range(1, world + 1) if world % n == 0])} would be"
            )
        shard = world // fixed
    if shard * fixed != world:
        raise UserError(
            f"{origin('parallelism.dp_shard')}: dp_replicate * dp_shard * cp = {parallelism.dp_replicate} * {shard} * "
            f"{parallelism.cp} = {shard * fixed}, but there are {world} processes; use NPROC={shard * fixed}, or dp_shard = -1"
        )
    ranks = shard * parallelism.cp
    if ranks % parallelism.ep:
        raise UserError(
            f"{origin('parallelism.ep')} = {parallelism.ep} must divide dp_shard * cp = {ranks}, whose ranks it borrows: "
            f"{_numbers([n for n in range(1, ranks + 1) if ranks % n == 0])}"
        )
    return Degrees(parallelism.dp_replicate, shard, parallelism.cp, parallelism.ep)


def check_degrees(config: Config, degrees: Degrees, origin: Origin) -> None:
    """Raises UserError for a model or a batch that doesn't fit the degrees."""
    moe, training = config.model.moe, config.training
    if moe.experts % degrees.ep:
        raise UserError(
            f"{origin('parallelism.ep')} = {degrees.ep} must divide model.moe.experts = {moe.experts}: "
            f"{_numbers([n for n in range(1, moe.experts + 1) if moe.experts % n == 0])}"
        )
    if degrees.ep > 1 and expert_shard_dim(config, degrees) is None:
        raise UserError(
            f"{origin('parallelism.ep')}: the {degrees.expert_fsdp} ranks beside ep can't share an expert evenly: they must "
            f"divide model.moe.hidden_dim = {moe.hidden_dim} and model.dim = {config.model.dim}"
        )
    if training.seq_len % (2 * degrees.cp) and degrees.cp > 1:
        raise UserError(
            f"{origin('training.seq_len')} = {training.seq_len} must be a multiple of 2 * parallelism.cp = {2 * degrees.cp}: "
            "every rank takes two pieces of a sequence"
        )
    size = (training.microbatch_size or 1) * degrees.data
    if training.batch_size % size:
        parts = f"{training.microbatch_size} (training.microbatch_size) * " if training.microbatch_size else ""
        raise UserError(
            f"{origin('training.batch_size')} = {training.batch_size} is not a multiple of {parts}{degrees.data}, the ranks "
            "with sequences of their own"
        )


def expert_shard_dim(config: Config, degrees: Degrees) -> int | None:
    """The dimension in which an expert's weights (E, 2F, D) and (E, D, F) are sharded beside ep; None if none is even."""
    n, moe, dim = degrees.expert_fsdp, config.model.moe, config.model.dim
    if (2 * moe.hidden_dim) % n == 0 and dim % n == 0:
        return 1
    if moe.hidden_dim % n == 0 and dim % n == 0:
        return 2
    return None


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
