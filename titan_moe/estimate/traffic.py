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
from torchtitan_ext.dtypes import accumulation_dtype

COUNT_BYTES = 8  # int64
NORM_BYTES = 8  # float64 on a CPU


class Line(NamedTuple):
    collective: str
    what: str
    bytes: int


def traffic(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """model: after `parallelize`. One line per purpose, for a whole step; nothing that is 0."""
    found = [
        *sharding(model, config, degrees),
        *experts(model, config, degrees),
        *context(model, config, degrees),
        *tensor(model, config, degrees),
        *pipeline(model, config, degrees),
        *numbers(model, config, degrees),
    ]
    return [line for line in found if line.bytes]


class _Sizes(NamedTuple):
    steps: int
    """Micro-steps."""
    tokens: int
    """Tokens of a rank in one of them."""
    compute: int
    """Bytes of a number in the compute type."""
    exact: int
    """Bytes of a number in the type of losses and reductions."""
    forwards: int
    """Forward passes of a block for one backward pass: 2 when it is recomputed."""


def sizes(model: Transformer, config: Config, degrees: Degrees) -> _Sizes:
    return _Sizes(
        steps=micro_steps(config, degrees),
        tokens=micro_batch_size(config, degrees) * config.training.seq_len // degrees.cp,
        compute=torch.finfo(model.dtype).bits // 8,
        exact=torch.finfo(accumulation_dtype(model.dtype)).bits // 8,
        forwards=1 if config.activation_checkpoint.mode == "none" else 2,
    )


def sharding(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """FSDP's gathers and reductions, HSDP's sums, and the routers' gradients."""
    if degrees.token_ranks == 1:
        return []
    s = sizes(model, config, degrees)
    gathered = reduced = summed = 0
    reductions = 1 if config.parallelism.defer_reduction and degrees.pp == 1 else s.steps
    whole = {id(weight) for weight in routers(model)}
    inside = {id(p) for block in model.blocks() for p in block.parameters()}
    expert = {id(p) for moe in model.moe_modules() for p in moe.experts.parameters()}
    for parameter in model.parameters():
        if id(parameter) in whole:
            continue
        own = local(parameter).numel()
        ranks = degrees.expert_fsdp if id(parameter) in expert else degrees.fsdp
        again = id(parameter) in inside and config.parallelism.reshard_after_forward
        if ranks > 1:
            gathered += own * s.compute * s.steps * (2 if again else 1)
            reduced += own * ranks * s.exact * reductions
        if degrees.dp_replicate > 1:
            summed += own * s.exact * reductions
    replicated = sum(weight.numel() for weight in routers(model)) * s.exact
    return [
        Line("all-gather", "sharded parameters", gathered),
        Line("reduce-scatter", "their gradients", reduced),
        Line("all-reduce", "gradients of replicas", summed),
        Line("all-reduce", "routers' gradients", replicated),
    ]


def experts(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """Tokens to experts and back, and what the losses add."""
    if degrees.ep == 1:
        return []
    s, moe, terms = sizes(model, config, degrees), config.model.moe, model.terms
    moe_layers = len(model.moe_modules())
    layers = moe_layers * s.steps
    rows = s.tokens * moe.top_k
    trips = s.forwards + 1  # there in every forward pass, and the gradient back
    hidden = moe.hidden_dim // degrees.tp
    added = 0
    if "sp" in terms.weights:
        weighted = terms.weights["sp"] > 0
        times = s.forwards + (1 if weighted else 0)
        if terms.sp_method == "sketch":
            added = rows * (times * (terms.sp_sketch_dim * s.compute + s.exact) + s.forwards * 4)
        elif weighted and terms.sp_method == "sample":
            added = int(terms.sp_sample_fraction * rows) * hidden * s.compute * times + s.forwards * rows
        else:
            added = rows * hidden * s.compute * times
    answers = gradients = 0
    if "erc" in terms.weights:  # once a step: own columns of (E, E), and the whole gradient
        answers = moe_layers * s.exact * moe.experts * (moe.experts // degrees.ep * s.forwards)
        gradients = moe_layers * s.exact * moe.experts**2 if terms.weights["erc"] > 0 else 0
    return [
        Line("all-to-all", "tokens to experts", layers * rows * config.model.dim * s.compute * trips),
        Line("all-to-all", "outputs home", layers * rows * config.model.dim * s.compute * trips),
        Line("all-to-all", "sp", layers * added),
        Line("all-to-all", "counts of rows", layers * s.forwards * moe.experts * COUNT_BYTES),
        Line("all-gather", "erc", answers),
        Line("reduce-scatter", "erc's gradient", gradients),
    ]


def context(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """Keys and values of the other parts of the sequences."""
    if degrees.cp == 1:
        return []
    s, settings = sizes(model, config, degrees), config.model
    width = (
        2 * (settings.kv_heads or settings.heads) * (settings.head_dim or settings.dim // settings.heads) // degrees.tp
    )
    layers = len(model.blocks()) * s.steps
    return [
        Line("all-gather", "keys and values", layers * s.tokens * width * s.compute * s.forwards),
        Line("reduce-scatter", "their gradients", layers * s.tokens * degrees.cp * width * s.exact),
    ]


def tensor(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """Tokens to partial products and back, and the sums inside MoE layers."""
    if degrees.tp == 1:
        return []
    s, settings, terms = sizes(model, config, degrees), config.model, model.terms
    own = s.tokens // degrees.tp * settings.dim * s.compute
    whole = s.tokens * settings.dim * s.compute
    blocks, layers = len(model.blocks()), len(model.moe_modules())
    first, last = hasattr(model, "embedding"), hasattr(model, "norm")  # of a pipeline, this rank's
    # Attention and feed-forward layer of a block; what a block ends with is not recomputed, as nothing after it needs it.
    gathers = blocks * 2 * (s.forwards + 1) + first + last
    scatters = blocks * (s.forwards + 1 + 2) + first
    outputs = layers * s.forwards * settings.moe.top_k * whole if terms.needs_outputs else 0
    gates = layers * s.tokens * settings.moe.top_k * s.exact
    head = last * (whole + 3 * s.tokens * s.exact)
    return [
        Line("all-gather", "tokens to products", s.steps * gathers * own),
        Line("reduce-scatter", "partial products", s.steps * scatters * whole),
        Line("all-reduce", "experts' outputs for o", s.steps * outputs),
        Line("all-reduce", "gradients of gate weights", s.steps * gates),
        Line("all-reduce", "head", s.steps * head),
        Line("all-reduce", "norms' gradients", sum(local(weight).numel() for weight in norms(model)) * s.exact),
        *tensor_losses(model, config, degrees),
    ]


def tensor_losses(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """The losses' sums over parts of the hidden units."""
    s, moe, terms = sizes(model, config, degrees), config.model.moe, model.terms
    layers = len(model.moe_modules())
    rows = s.tokens * moe.top_k
    grams = widened = answers = 0
    if "sp" in terms.weights and terms.sp_method == "sketch":
        grams = s.forwards * rows * (terms.sp_sketch_dim * s.compute + s.exact)
    elif terms.weights.get("sp", 0.0) > 0:
        share = terms.sp_sample_fraction if terms.sp_method == "sample" else 1.0
        grams = s.forwards * int(share * rows) * moe.top_k * s.exact
    if terms.needs_activations:
        widened = s.forwards * rows * moe.hidden_dim // degrees.tp * s.compute
    if "erc" in terms.weights:  # answers of this rank's experts, and the gradient of the routing vectors
        gradient = moe.experts * config.model.dim if terms.weights["erc"] > 0 else 0
        answers = (s.forwards * moe.experts // degrees.ep * moe.experts + gradient) * s.exact
    return [
        Line("all-reduce", "sp's products of parts", s.steps * layers * grams),
        Line("all-gather", "whole activations", s.steps * layers * widened),
        Line("all-reduce", "erc's answers of parts", layers * answers),
    ]


def pipeline(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """Hidden states and carry to the next stage; the first rank's stages, each of which has one."""
    if degrees.pp == 1:
        return []
    s, terms = sizes(model, config, degrees), model.terms
    handed_on = len(layers_per_stage(config)) // degrees.pp
    hidden = s.tokens // degrees.tp * config.model.dim * s.compute
    numbers = len(terms.names) + s.tokens * terms.previous_width(config.model.moe.experts) + 3 * model.moe_layers
    carry = numbers * s.exact + model.moe_layers * config.model.moe.experts * COUNT_BYTES
    return [
        Line("send", "hidden states", s.steps * handed_on * hidden),
        Line("send", "the carry", s.steps * handed_on * carry),
    ]


def numbers(model: Transformer, config: Config, degrees: Degrees) -> list[Line]:
    """What losses take over all tokens of a micro-step or a sequence, what a step reports, and the gradient's norm."""
    s, experts, terms = sizes(model, config, degrees), config.model.moe.experts, model.terms
    layers, sequences = len(model.moe_modules()), micro_batch_size(config, degrees)
    ranks = {"global": degrees.token_ranks, "sequence": degrees.cp, "microbatch": 1}
    shares = 0
    if "lb" in terms.weights and ranks[terms.lb_scope] > 1:
        shares += layers * experts * (COUNT_BYTES if terms.lb_scope == "global" else sequences * s.exact)
    if "v" in terms.weights and terms.v_variant == "paper" and ranks[terms.v_scope] > 1:
        shares += layers * (experts + 1) * s.exact * (1 if terms.v_scope == "global" else sequences)
    if "cp" in terms.weights and terms.cp_source == "transition" and degrees.token_ranks > 1:
        shares += max(layers - 1, 0) * experts**2 * s.exact
    report = (2 + len(terms.names) + 3 * model.moe_layers) * s.exact + model.moe_layers * experts * COUNT_BYTES
    sums = (degrees.token_ranks > 1) + (degrees.pp > 1)
    meshes = {shard_groups(parameter) for parameter in model.parameters()}
    norm = NORM_BYTES * (sum(map(len, meshes)) + (degrees.pp > 1))
    return [
        Line("all-reduce", "shares and means of lb, v and cp", s.steps * s.forwards * shares),
        Line("all-reduce", "a step's report and norm", report * sums + norm),
    ]
