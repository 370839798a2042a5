"""What a training step sends: bytes that one rank hands to each kind of collective, by formula.

Rows that happen to stay on their rank are counted as sent; under expert parallelism the numbers are means over ranks, as
routing decides. tests/distributed/test_traffic.py counts the real ones.
"""

from typing import NamedTuple

import torch

from titan_moe.config.degrees import Degrees, layers_per_stage, micro_batch_size, micro_steps
from titan_moe.config.tables import Config
from titan_moe.model.gemm import local
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.fsdp import routers
from titan_moe.parallel.norm import shard_groups
from titan_moe.parallel.tensor import norms
from titan_moe.runtime.stopping import STOPPING
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.terms import Line, Sizes
from torchtitan_ext.terms.base import COUNT_BYTES

NORM_BYTES = 8  # float64 on a CPU
VOTE_BYTES = 4  # float32


def traffic(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """model: after `parallelize`. One line per purpose, for a whole step; nothing that is 0."""
    found = [
        *sharding(model, config, degrees),
        *experts(model, config, degrees),
        *context(model, config, degrees),
        *tensor(model, config, degrees),
        *pipeline(model, config, degrees),
        *numbers(model, config, degrees),
        *(line for term in model.terms.terms for line in term.traffic(sizes(model, config, degrees))),
    ]
    return [line for line in found if line.bytes]


def sizes(model: Transformer, config: Config, degrees: Degrees) -> Sizes:
    """What the formulas are made of, for one rank."""
    settings, moe, sequences = config.model, config.model.moe, micro_batch_size(config, degrees)
    return Sizes(
        steps=micro_steps(config, degrees),
        tokens=sequences * config.training.seq_len // degrees.cp,
        sequences=sequences,
        compute=torch.finfo(model.dtype).bits // 8,
        exact=torch.finfo(accumulation_dtype(model.dtype)).bits // 8,
        forwards=1 if config.activation_checkpoint.mode == "none" else 2,
        exchanges=2 if config.activation_checkpoint.mode == "full" else 1,
        moe_layers=len(model.moe_modules()),
        experts=moe.experts,
        top_k=moe.top_k,
        hidden=moe.hidden_dim // degrees.tp,
        dim=settings.dim,
        ep=degrees.ep,
        tp=degrees.tp,
        cp=degrees.cp,
        token_ranks=degrees.token_ranks,
        all_moe_layers=model.moe_layers,
        last_stage=degrees.pp == 1,  # of rank 0, which has the first stage
    )


class Shards(NamedTuple):
    """What FSDP and HSDP exchange of the parameters that are sharded over the same ranks; bytes that a rank hands over."""

    ranks: int
    gathered: int
    reduced: int
    summed: int
    """Over the replicas."""


def shards(model: Transformer, config: Config, degrees: Degrees) -> list[Shards]:
    """Of all parameters but the experts', then of the experts'."""
    s = sizes(model, config, degrees)
    reductions = 1 if config.parallelism.defer_reduction and degrees.pp == 1 else s.steps
    whole = {id(weight) for weight in routers(model)}
    inside = {id(p) for block in model.blocks() for p in block.parameters()}
    expert = {id(p) for moe in model.moe_modules() for p in moe.experts.parameters()}
    found = []
    for ranks, experts_too in ((degrees.fsdp, False), (degrees.expert_fsdp, True)):
        gathered = reduced = summed = 0
        for parameter in model.parameters():
            if id(parameter) in whole or (id(parameter) in expert) != experts_too:
                continue
            own = local(parameter).numel()
            again = id(parameter) in inside and config.parallelism.reshard_after_forward
            if ranks > 1:
                gathered += own * s.compute * s.steps * (2 if again else 1)
                reduced += own * ranks * s.exact * reductions
            if degrees.dp_replicate > 1:
                summed += own * s.exact * reductions
        found.append(Shards(ranks, gathered, reduced, summed))
    return found


def sharding(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """FSDP's gathers and reductions, HSDP's sums, and the routers' gradients."""
    if degrees.token_ranks == 1:
        return []
    found = shards(model, config, degrees)
    return [
        Line("all-gather", "sharded parameters", sum(one.gathered for one in found)),
        Line("reduce-scatter", "their gradients", sum(one.reduced for one in found)),
        Line("all-reduce", "gradients of replicas", sum(one.summed for one in found)),
        Line("all-reduce", "routers' gradients", router_gradients(model, config, degrees)),
    ]


def router_gradients(model: Transformer, config: Config, degrees: Degrees) -> int:
    return sum(weight.numel() for weight in routers(model)) * sizes(model, config, degrees).exact


def experts(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """Tokens and gate weights to the experts, outputs back, and the rows that terms need."""
    if degrees.ep == 1:
        return []
    s, needs, gradient = sizes(model, config, degrees), model.terms.needs, model.terms.needs_gradient
    layers = s.moe_layers * s.steps
    outputs = needs.outputs * (s.exchanges + gradient.outputs)
    activations = needs.activations * (s.exchanges + gradient.activations)
    trips = s.exchanges + 1  # there and back, and the gradient in the other direction
    row = s.dim * s.compute
    return [
        Line("all-to-all", "tokens to experts", layers * trips * s.rows * row),
        Line("all-to-all", "gate weights to experts", layers * trips * s.rows * s.exact),
        Line("all-to-all", "outputs to tokens", layers * trips * s.rows * row),
        Line("all-to-all", "counts of rows", layers * s.forwards * s.experts * COUNT_BYTES),
        Line("all-to-all", "outputs for terms", layers * outputs * s.rows * row),
        Line("all-to-all", "activations for terms", layers * activations * s.rows * s.hidden * s.compute),
    ]


def context(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """Keys and values of the other parts of the sequences."""
    if degrees.cp == 1:
        return []
    s = sizes(model, config, degrees)
    numbers = s.steps * s.tokens * sum(block.attention.gathered_width for block in model.blocks()) // degrees.tp
    return [
        Line("all-gather", "keys and values", numbers * s.compute * s.forwards),
        Line("reduce-scatter", "their gradients", numbers * degrees.cp * s.exact),
    ]


def tensor(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """Tokens to partial products and back, and the sums inside MoE layers."""
    if degrees.tp == 1:
        return []
    s, settings, needs = sizes(model, config, degrees), config.model, model.terms.needs
    own = s.tokens // degrees.tp * settings.dim * s.compute
    whole = s.tokens * settings.dim * s.compute
    blocks, layers = len(model.blocks()), len(model.moe_modules())
    head_here = degrees.pp == 1  # rank 0 has the first stage: always the embedding, the head only without a pipeline
    # Attention and feed-forward layer of a block; what a block ends with is not recomputed, as nothing after it needs it.
    gathers = blocks * 2 * (s.forwards + 1) + 1 + head_here
    scatters = blocks * (s.forwards + 1 + 2) + 1
    outputs = needs.outputs * layers * s.forwards * settings.moe.top_k * whole
    activations = needs.activations * layers * s.forwards * s.rows * s.hidden * s.compute
    gates = layers * s.tokens * (settings.moe.top_k + settings.moe.shared_gate) * s.exact
    squares = blocks * (s.forwards + 1) * 2 * s.tokens * s.exact if settings.qk_norm == "projection" else 0
    head = head_here * (whole + 3 * s.tokens * s.exact)
    return [
        Line("all-gather", "tokens to products", s.steps * gathers * own),
        Line("reduce-scatter", "partial products", s.steps * scatters * whole),
        Line("all-reduce", "expert outputs for terms", s.steps * outputs),
        Line("all-gather", "activations for terms", s.steps * activations),
        Line("all-reduce", "gradients of gate weights", s.steps * gates),
        Line("all-reduce", "squared lengths of queries and keys", s.steps * squares),
        Line("all-reduce", "head", s.steps * head),
        Line("all-reduce", "norms' gradients", sum(local(weight).numel() for weight in norms(model)) * s.exact),
    ]


def pipeline(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """Hidden states and carry to the next stage, for every stage of rank 0, and a tied embedding's gradient to the last one."""
    if degrees.pp == 1:
        return []
    s, terms = sizes(model, config, degrees), model.terms
    stages = len(layers_per_stage(config)) // degrees.pp
    hidden = s.tokens // degrees.tp * config.model.dim * s.compute
    tied = local(model.embedding).numel() if config.model.tie_embeddings else 0
    numbers = len(terms.names) + s.tokens * terms.carried_width(s.experts)
    numbers += (len(terms.measures) + terms.sums_width(s.experts)) * model.moe_layers
    carry = numbers * s.exact + model.moe_layers * config.model.moe.experts * COUNT_BYTES
    return [
        Line("send", "hidden states", s.steps * stages * hidden),
        Line("send", "the carry", s.steps * stages * carry),
        Line("send", "tied embedding's gradient", tied * s.exact),
    ]


def numbers(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """What a step reports, and the norm of the gradient."""
    s, terms = sizes(model, config, degrees), model.terms
    votes = len(STOPPING)
    report = (votes + 2 + len(terms.names) + len(terms.measures) * model.moe_layers) * s.exact
    report += model.moe_layers * s.experts * COUNT_BYTES
    sums = (degrees.token_ranks > 1) + (degrees.pp > 1)
    meshes = {shard_groups(parameter) for parameter in model.parameters()}
    norm = NORM_BYTES * (sum(map(len, meshes)) + (degrees.pp > 1))
    votes_tp = votes * VOTE_BYTES * (degrees.tp > 1)
    return [Line("all-reduce", "a step's report and norm", report * sums + norm + votes_tp)]
