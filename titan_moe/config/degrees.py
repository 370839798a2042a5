"""Parallelism degrees (ranks per mesh dimension), checked before any process starts. Does not import torch."""

import math
from collections.abc import Callable
from typing import NamedTuple

from titan_moe.config.tables import Config, Parallelism
from titan_moe.errors import UserError

Origin = Callable[[str], str]  # key -> "file: key", for error messages


class Degrees(NamedTuple):
    """World = pp * dp_replicate * dp_shard * cp * tp, the last one fastest; ep ranks are adjacent in dp_shard * cp."""

    dp_replicate: int
    dp_shard: int
    cp: int
    ep: int
    tp: int
    pp: int

    @property
    def world(self) -> int:
        return self.pp * self.token_ranks * self.tp

    @property
    def token_ranks(self) -> int:
        """Ranks of a pipeline stage that have different tokens; a group of tensor-parallel ranks counts as one."""
        return self.dp_replicate * self.dp_shard * self.cp

    @property
    def data(self) -> int:
        """Ranks of a pipeline stage that have different sequences; a group of cp and tp ranks counts as one."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Size of the FSDP mesh of all parameters but the experts'."""
        return self.dp_shard * self.cp

    @property
    def expert_fsdp(self) -> int:
        """Size of the FSDP mesh of each expert's parameters, orthogonal to ep."""
        return self.fsdp // self.ep


def resolve(parallelism: Parallelism, world: int, origin: Origin) -> Degrees:
    """The degrees for `world` processes. Raises UserError for an impossible combination and names possible numbers."""
    fixed = parallelism.pp * parallelism.dp_replicate * parallelism.cp * parallelism.tp
    shard = parallelism.dp_shard
    if shard in (-1, 0):
        if world % fixed:
            raise UserError(
                f"{origin('parallelism')}: {world} processes are not a multiple of pp * dp_replicate * cp * tp = "
                f"{fixed}; {_divisors(world)} would be"
            )
        shard = world // fixed
    if shard * fixed != world:
        factors = (parallelism.pp, parallelism.dp_replicate, shard, parallelism.cp, parallelism.tp)
        product = f"{' * '.join(map(str, factors))} = {shard * fixed}"
        raise UserError(
            f"{origin('parallelism.dp_shard')}: pp * dp_replicate * dp_shard * cp * tp = {product}, but there are "
            f"{world} processes; use NPROC={shard * fixed}, or dp_shard = -1"
        )
    ranks = shard * parallelism.cp
    if ranks % parallelism.ep:
        raise UserError(
            f"{origin('parallelism.ep')} = {parallelism.ep} must divide dp_shard * cp = {ranks}, whose ranks it "
            f"borrows: {_divisors(ranks)}"
        )
    return Degrees(parallelism.dp_replicate, shard, parallelism.cp, parallelism.ep, parallelism.tp, parallelism.pp)


def check_degrees(config: Config, degrees: Degrees, origin: Origin) -> None:
    """Raises UserError for a model or a batch that doesn't fit the degrees."""
    moe, training = config.model.moe, config.training
    if moe.experts % degrees.ep:
        raise UserError(
            f"{origin('parallelism.ep')} = {degrees.ep} must divide model.moe.experts = {moe.experts}: "
            f"{_divisors(moe.experts)}"
        )
    hidden = moe.hidden_dim // degrees.tp
    if degrees.ep > 1 and all(
        size % degrees.expert_fsdp for size in (moe.experts // degrees.ep, config.model.dim, hidden)
    ):
        raise UserError(
            f"{origin('parallelism.ep')}: the experts of a rank can't be sharded evenly over {degrees.expert_fsdp} ranks "
            f"(dp_shard * cp / ep): that must divide model.moe.experts / ep = {moe.experts // degrees.ep}, "
            f"model.dim = {config.model.dim} or model.moe.hidden_dim / tp = {hidden}"
        )
    check_tensor_parallel(config, degrees.tp, origin)
    check_pipeline(config, degrees, origin)
    tokens = training.seq_len // degrees.cp
    if tokens % degrees.tp:
        raise UserError(
            f"{origin('training.seq_len')} = {training.seq_len}: the {tokens} tokens of a sequence on a rank must "
            f"be a multiple of parallelism.tp = {degrees.tp}, as hidden states are sharded over tp ranks by tokens"
        )
    if training.seq_len % (2 * degrees.cp) and degrees.cp > 1:
        raise UserError(
            f"{origin('training.seq_len')} = {training.seq_len} must be a multiple of 2 * parallelism.cp = "
            f"{2 * degrees.cp}: every rank takes two pieces of a sequence"
        )
    size = (training.microbatch_size or 1) * degrees.data
    if training.batch_size % size:
        parts = f"{training.microbatch_size} (training.microbatch_size) * " if training.microbatch_size else ""
        raise UserError(
            f"{origin('training.batch_size')} = {training.batch_size} is not a multiple of {parts}{degrees.data}, the "
            "number of ranks with different sequences"
        )


def check_tensor_parallel(config: Config, tp: int, origin: Origin) -> None:
    """Raises UserError when heads, hidden units or vocabulary can't be sharded evenly over tp ranks."""
    model = config.model
    sizes = {
        "model.heads": model.heads,
        "model.kv_heads": model.kv_heads or model.heads,
        "model.moe.hidden_dim": model.moe.hidden_dim,
        "model.vocab_size": model.vocab_size or config.tokenizer.vocab_size,
    }
    if model.moe.dense_hidden_dim:
        sizes["model.moe.dense_hidden_dim"] = model.moe.dense_hidden_dim
    for key, size in sizes.items():
        if size % tp:
            raise UserError(
                f"{origin('parallelism.tp')} = {tp} must divide {key} = {size}; "
                f"{_divisors(math.gcd(*sizes.values()))} divide heads, kv_heads, moe.hidden_dim and the vocabulary"
            )


def micro_batch_size(config: Config, degrees: Degrees) -> int:
    """Sequences of a rank in one microbatch."""
    return config.training.microbatch_size or config.training.batch_size // degrees.data


def micro_steps(config: Config, degrees: Degrees) -> int:
    """Microbatches of a rank in one optimizer step."""
    return config.training.batch_size // (micro_batch_size(config, degrees) * degrees.data)


def layers_per_stage(config: Config) -> list[int]:
    """Number of blocks in each pipeline stage; Interleaved1F1B has two stages per rank."""
    parallelism, layers = config.parallelism, config.model.layers
    if parallelism.pp_layers:
        return parallelism.pp_layers
    stages = parallelism.pp * (2 if parallelism.pp_schedule == "Interleaved1F1B" else 1)
    return [layers * (n + 1) // stages - layers * n // stages for n in range(stages)]


def stage_layers(layers: list[int]) -> list[range]:
    """Block indices of each stage."""
    ends = [sum(layers[: n + 1]) for n in range(len(layers))]
    return [range(end - count, end) for end, count in zip(ends, layers, strict=True)]


def check_pipeline(config: Config, degrees: Degrees, origin: Origin) -> None:
    """Raises UserError for stages or microbatches that the schedule can't take."""
    parallelism, pp = config.parallelism, degrees.pp
    if pp == 1:
        return
    stages, interleaved = layers_per_stage(config), parallelism.pp_schedule == "Interleaved1F1B"
    if sum(stages) != config.model.layers or min(stages) < 1:
        raise UserError(
            f"{origin('parallelism.pp_layers')} = {stages}: stages of at least one block each must add up to "
            f"model.layers = {config.model.layers}"
        )
    if len(stages) % pp or (len(stages) > pp) != interleaved:
        wanted = f"a multiple of {pp} beyond it" if interleaved else str(pp)
        raise UserError(
            f"{origin('parallelism.pp_layers')}: {len(stages)} stages; {parallelism.pp_schedule} over {pp} ranks "
            f"needs {wanted}"
        )
    steps = micro_steps(config, degrees)
    if steps < pp and parallelism.pp_schedule == "1F1B":
        raise UserError(
            f"{origin('training.microbatch_size')}: {steps} microbatches a step for {pp} stages; 1F1B needs at least "
            "as many, or take pp_schedule = 'GPipe'"
        )
    rounds = max(1, steps // pp)
    if interleaved and (steps < pp or steps % rounds):
        raise UserError(
            f"{origin('training.microbatch_size')}: {steps} microbatches a step; Interleaved1F1B needs a multiple of "
            f"parallelism.pp = {pp}"
        )


def _divisors(number: int) -> str:
    """The first divisors of a number, for an error that says which values are possible."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)})
    return ", ".join(map(str, divisors[:24])) + (", ..." if len(divisors) > 24 else "")
