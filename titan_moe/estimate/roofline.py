"""The time of a training step by the data sheet of a card: a roofline, so what no program can beat by much.

Every part is its work over one peak: products over FLOP/s (or over memory bandwidth for reading weights, if that takes
longer), everything else on tensors over memory bandwidth, collectives over the slower of the links that they use.
Nothing of it is measured; a real step takes longer.

T tokens and R routed rows of a rank's microbatch, D model width, F expert hidden width, V vocabulary.
"""

from typing import NamedTuple

from titan_moe.config.degrees import Degrees
from titan_moe.config.tables import Config
from titan_moe.estimate.counts import count, meta_model
from titan_moe.estimate.traffic import (
    context,
    experts,
    numbers,
    pipeline,
    router_gradients,
    shards,
    sizes,
    tensor,
)
from titan_moe.model.gemm import local
from titan_moe.model.transformer import Transformer
from titan_moe.runtime.cards import CARDS_PER_NODE, Card
from torchtitan_ext.terms import Line, Sizes

ASSUMPTIONS = (
    "tokens are spread evenly over experts, layers evenly over pipeline stages",
    "element-wise work reads and writes each tensor as often as fused kernels need",
    f"{CARDS_PER_NODE} cards per node; ranks in the order pp, dp_replicate, dp_shard, cp, tp, the last one fastest",
    "rings: (n - 1) / n of a tensor passes each rank's link (all-reduce twice that); no latency",
    "peaks as on the data sheets; large matrix products reach 70 to 80% of theirs",
)

# Passes over a tensor in a forward and a backward pass of fused kernels, in reads and writes of the whole tensor.
SWIGLU = 8  # of (R, F): gate, up, activations; their gradients, gate and up again
GATHER_COMBINE = 6  # of (R, D): gather, weighted sum, and both backward
BLOCK = 16  # of (T, D): two norms and two residual additions
ATTENTION = 20  # of (T, heads * head_dim): rotary positions and attention, on queries, keys, values and outputs
LOGITS = 4  # of (T, V): write, read for the sum, read and write as their gradient
ADAMW = 10  # of the parameters: gradient, weight and two moments read, three written; norm and clipping of the gradient


class Collective(NamedTuple):
    line: Line
    ranks: int
    """Members of the group."""
    span: int
    """From the first to the last member, in ranks."""


class StepTime(NamedTuple):
    """Seconds of one rank in a step, by what bounds them."""

    products: float
    memory: float
    node: float
    """Collectives inside a node."""
    network: float
    """Collectives between nodes."""
    bubble: float
    """Share of the pipeline's time in which a stage waits."""

    @property
    def hidden(self) -> float:
        """If all communication passes beside the computation."""
        return max(self.products + self.memory, self.node + self.network) / (1 - self.bubble)

    @property
    def exposed(self) -> float:
        """If none does."""
        return (self.products + self.memory + self.node + self.network) / (1 - self.bubble)


def wire_bytes(collective: str, handed: int, ranks: int) -> float:
    """Bytes that pass a rank's link when it hands this many to the collective."""
    if collective == "all-gather":  # it hands in its part and receives the others'
        return handed * (ranks - 1)
    factor = {"all-reduce": 2 * (ranks - 1) / ranks, "send": 1.0}.get(collective, (ranks - 1) / ranks)
    return handed * factor


def collectives(model: Transformer, config: Config, degrees: Degrees) -> list[Collective]:
    """Everything that a step sends, and over which ranks. model: after `parallelize`."""
    d = degrees
    everyone = d.token_ranks * d.tp
    groups = [
        (experts(model, config, d), d.ep, d.ep * d.tp),
        (context(model, config, d), d.cp, d.cp * d.tp),
        (tensor(model, config, d), d.tp, d.tp),
        (pipeline(model, config, d), d.pp, d.world),
        (numbers(model, config, d), d.world, d.world),
    ]
    for line in (line for term in model.terms.terms for line in term.traffic(sizes(model, config, degrees))):
        if line.collective != "all-reduce":  # rows and responses of experts
            groups.append(([line], d.ep, d.ep * d.tp))
        elif "hidden units" in line.what:  # what tensor parallelism shards
            groups.append(([line], d.tp, d.tp))
        else:
            groups.append(([line], d.token_ranks, everyone))
    if d.token_ranks > 1:
        groups.append(([Line("all-reduce", "routers", router_gradients(model, config, d))], d.token_ranks, everyone))
        for part in shards(model, config, d):
            sharded = [Line("all-gather", "shards", part.gathered), Line("reduce-scatter", "shards", part.reduced)]
            groups.append((sharded, part.ranks, d.fsdp * d.tp))
            groups.append(([Line("all-reduce", "replicas", part.summed)], d.dp_replicate, everyone))
    return [Collective(line, ranks, span) for lines, ranks, span in groups for line in lines if line.bytes]


def memory_bytes(model: Transformer, config: Config, degrees: Degrees) -> float:
    """Bytes that element-wise work and the optimizer move in a step of one rank."""
    s, settings = sizes(model, config, degrees), config.model
    blocks, recomputed = len(model.blocks()), 1.5 if s.forwards == 2 else 1.0
    heads = settings.heads * settings.head_width // degrees.tp
    per_layer = (SWIGLU * s.rows * s.hidden + GATHER_COMBINE * s.rows * s.dim) * s.compute
    per_block = (BLOCK * s.tokens * s.dim // degrees.tp + ATTENTION * s.tokens * heads) * s.compute
    head = LOGITS * s.tokens * settings.vocab_size // degrees.tp * s.exact / degrees.pp
    own = sum(local(parameter).numel() for parameter in model.parameters())
    passes = (s.moe_layers * per_layer + blocks * per_block) * recomputed + head
    return s.steps * passes + ADAMW * own * s.exact


def product_seconds(model: Transformer, config: Config, degrees: Degrees, card: Card) -> float:
    """Matrix products of one rank in a step: bound by FLOP/s, or by reading the weights when an expert has few rows."""
    s = sizes(model, config, degrees)
    flops_per_token = count(meta_model(config.model, model.dtype), config.training.seq_len).flops_per_token
    again = 4 / 3 if config.activation_checkpoint.mode == "full" else 1.0  # the forward pass is a third
    flops = flops_per_token * again * config.training.batch_size * config.training.seq_len / degrees.world
    read = s.steps * gathered_weights(model, degrees) * (3 * s.compute + s.exact)  # forward, twice backward, gradient
    return max(flops / card.bfloat16, read / card.memory)


def gathered_weights(model: Transformer, degrees: Degrees) -> float:
    """Numbers in the weights that a rank multiplies with: FSDP's shards gathered, not those of ep, tp and pp."""
    expert = {id(p) for moe in model.moe_modules() for p in moe.experts.parameters()}
    total = 0.0
    for parameter in model.parameters():
        total += parameter.numel() / degrees.tp / (degrees.ep if id(parameter) in expert else 1)
    return total


def step_time(model: Transformer, config: Config, degrees: Degrees, card: Card) -> StepTime:
    """model: after `parallelize`."""
    node = network = 0.0
    for one in collectives(model, config, degrees):
        size = wire_bytes(one.line.collective, one.line.bytes, one.ranks)
        if one.span <= CARDS_PER_NODE:
            node += size / card.link
        else:
            network += size / card.network
    s: Sizes = sizes(model, config, degrees)
    stages = 2 if config.parallelism.pp_schedule == "Interleaved1F1B" else 1
    idle = (degrees.pp - 1) / stages
    memory = memory_bytes(model, config, degrees) / card.memory
    products = product_seconds(model, config, degrees, card)
    return StepTime(products, memory, node, network, idle / (s.steps + idle))


def step_lines(model: Transformer, config: Config, degrees: Degrees, name: str, card: Card) -> list[str]:
    """The prediction and what it assumes, as `titan-moe plan` prints it."""
    time = step_time(model, config, degrees, card)
    tokens = config.training.batch_size * config.training.seq_len
    flops = count(meta_model(config.model, model.dtype), config.training.seq_len).flops_per_token * tokens
    rows = [
        ("matrix products", milliseconds(time.products)),
        ("memory", milliseconds(time.memory)),
        ("collectives in a node", milliseconds(time.node)),
        ("collectives between nodes", milliseconds(time.network)),
        ("pipeline stages wait", f"{time.bubble:.1%}"),
        ("a step", f"{milliseconds(time.hidden)} to {milliseconds(time.exposed)}"),
        ("tokens per second", f"{tokens / time.exposed:,.0f} to {tokens / time.hidden:,.0f}"),
        (
            "of the bfloat16 peak",
            f"{share(flops, time.exposed, degrees, card)} to {share(flops, time.hidden, degrees, card)}",
        ),
    ]
    head = f"a step by the data sheet of {name} (nothing measured; communication beside computation, to not at all)"
    lines = [head, *(f"  {label:<26} {value}" for label, value in rows)]
    return [*lines, *(f"  assumed: {text}" for text in ASSUMPTIONS)]


def share(flops: float, seconds: float, degrees: Degrees, card: Card) -> str:
    return f"{flops / seconds / degrees.world / card.bfloat16:.3f}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{1e3 * seconds:,.0f} ms"
