"""`titan-moe plan`: what a configuration amounts to, on any number of ranks, from a model without weights."""

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe.config.degrees import Degrees, micro_batch_size, resolve
from titan_moe.config.extensions import optimizers
from titan_moe.config.tables import Config
from titan_moe.data.tokenizer import read_tokenizer
from titan_moe.errors import UserError
from titan_moe.estimate.counts import count, meta_model
from titan_moe.estimate.roofline import step_lines
from titan_moe.estimate.traffic import sizes, traffic
from titan_moe.model.comm import TPComm
from titan_moe.model.gemm import local
from titan_moe.model.head import slice_tokens
from titan_moe.model.terms import terms_of
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.parallelize import CHOICES, PRODUCTS, parallelize
from titan_moe.runtime.cards import card_named
from titan_moe.runtime.device import GIB
from torchtitan_ext.dtypes import accumulation_dtype

LLAMA_2_VOCABULARY = 32000


def plan_text(config: Config, world: int, card: str = "") -> str:
    """Parameters, FLOPs, and for one of `world` ranks: memory by kind and bytes by collective; with a card's name also the
    time of a step by its data sheet."""
    vocab_size, source = vocabulary(config)
    settings = config.model.model_copy(update={"vocab_size": vocab_size})
    config = config.model_copy(update={"model": settings})
    counts = count(meta_model(settings, getattr(torch, config.training.dtype)), config.training.seq_len)
    moe = settings.moe
    degrees = resolve(config.parallelism, world, str)
    tokens = config.training.batch_size * config.training.seq_len
    model = sharded_model(config, degrees)
    s = sizes(model, config, degrees)
    layout = ", ".join(f"{name} {size}" for name, size in degrees._asdict().items())
    rows = [
        ("vocabulary", f"{vocab_size:,} ({source})"),
        ("MoE layers", f"{model.moe_layers} of {settings.layers}"),
        ("experts per layer", f"{moe.experts} routed, {moe.top_k} active, {moe.shared_experts} shared"),
        ("parameters", f"{counts.total:,}"),
        ("active parameters", f"{counts.active:,}"),
        ("FLOPs per token", f"{counts.flops_per_token:,} (forward and backward)"),
        ("tokens per step", f"{tokens:,}"),
        ("tokens in all", f"{tokens * config.training.steps:,}"),
        ("FLOPs in all", f"{counts.flops_per_token * tokens * config.training.steps:.3g}"),
        ("ranks", f"{world} ({layout})"),
        ("micro-steps", f"{s.steps} of {s.tokens:,} tokens per rank"),
    ]
    lines = [f"{name:<28} {value}" for name, value in rows]
    lines.append("memory of a rank")
    lines += [f"  {name:<26} {in_words(size)}" for name, size in memory(model, config, degrees).items()]
    moved = traffic(model, config, degrees)
    if moved:
        lines.append("a rank hands over in a step")
        lines += [f"  {f'{line.collective}, {line.what}':<40} {in_words(line.bytes)}" for line in moved]
    if card:
        lines += step_lines(model, config, degrees, card, card_named(card))
    return "\n".join(lines)


def in_words(size: int) -> str:
    """Bytes for a person to read."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size * 1024 / GIB:.2f} MiB"


def sharded_model(config: Config, degrees: Degrees) -> Transformer:
    """The network of rank 0 without storage, its process group a pretence. The group stays: a process plans once."""
    if degrees.world > 1 and not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=degrees.world)
    mesh = Mesh(degrees, torch.device("cpu"))
    with torch.device("meta"):
        model = Transformer(config.model, terms_of(config, mesh.ranks), getattr(torch, config.training.dtype))
    parallelize(model, config, mesh)
    return model


def memory(model: Transformer, config: Config, degrees: Degrees) -> dict[str, int]:
    """Bytes of one rank by kind, and their sum: a first figure for the peak, without an allocator's slack."""
    s = sizes(model, config, degrees)
    own = sum(local(parameter).numel() for parameter in model.parameters())
    state_tensors = optimizers[config.optimizer.name].state_tensors
    state = sum(
        state_tensors(name, parameter) * local(parameter).numel() for name, parameter in model.named_parameters()
    )
    whole = 0
    if degrees.token_ranks > 1:
        block = max(sum(p.numel() for p in block.parameters()) for block in model.blocks()) // (degrees.tp * degrees.ep)
        blocks = 2 if config.parallelism.reshard_after_forward else len(model.blocks())
        inside = {id(p) for block in model.blocks() for p in block.parameters()}
        root = sum(p.numel() for p in model.parameters() if id(p) not in inside) // degrees.tp
        whole = (blocks * block + root) * s.compute
        if config.parallelism.defer_reduction and s.steps > 1:
            whole += (len(model.blocks()) * block + root) * s.exact
    vocabulary = config.model.vocab_size // degrees.tp
    logits = min(s.tokens, slice_tokens(vocabulary, getattr(torch, config.training.dtype), on_cpu=False)) * vocabulary
    activations = saved_activations(config, degrees) + logits * s.compute
    if (
        degrees.pp > 1
    ):  # this rank's layers, and as many micro-batches as the first stage holds before it sees a gradient
        waiting = s.steps if config.parallelism.pp_schedule == "GPipe" else min(s.steps, degrees.pp)
        activations = activations * len(model.blocks()) // config.model.layers * waiting
    kinds = {
        "parameters": own * s.exact,
        "gradients": own * s.exact,
        f"state of {config.optimizer.name}": state * s.exact,
        "gathered from other ranks": whole,
        "activations": activations,
    }
    return kinds | {"in all": sum(kinds.values())}


class _Outputs(TorchDispatchMode):
    """Adds up the sizes of what some operations return."""

    def __init__(self, wanted: Collection[object]) -> None:
        super().__init__()
        self.wanted, self.bytes = wanted, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func in self.wanted:
            self.bytes += sum(t.numel() * t.element_size() for t in _tensors(out))
        return out


def _tensors(out: object) -> list[Tensor]:
    found = out if isinstance(out, (tuple, list)) else (out,)
    return [t for t in found if isinstance(t, Tensor)]


def saved_activations(config: Config, degrees: Degrees) -> int:
    """Bytes that autograd keeps of one micro-batch: counted on a network of one rank's size, run without storage.

    Even routing is assumed; experts' rows are as many as this rank's tokens send.
    """
    mode = config.activation_checkpoint.mode
    one, two = (_saved(config, degrees, layers, mode) for layers in (1, 2))
    # A dense first layer counts like the others: it has as many hidden units as an MoE layer has active ones, ...
    total = one + (two - one) * (config.model.layers - 1)
    if config.model.moe.dense_hidden_dim:  # ... unless the configuration gives it a width of its own.
        with_dense = _saved(config, degrees, 2, mode, dense=1)
        total += (with_dense - two) * config.model.moe.first_dense_layers
    if mode == "full":  # the block that is recomputed last is there as a whole
        first, second = (_saved(config, degrees, layers, "none") for layers in (1, 2))
        total += second - first
    return total


class _TokenShards(TPComm):
    """Gives tensors the shapes that they have on one tensor-parallel rank, without communication."""

    def __init__(self, tp: int) -> None:
        self.tp = tp

    def gather_sequence(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.tp, dim=1)

    gather_sequence_replicated = gather_sequence

    def reduce_scatter_sequence(self, x: Tensor) -> Tensor:
        return x.chunk(self.tp, dim=1)[0]


def _saved(config: Config, degrees: Degrees, layers: int, mode: str, dense: int = 0) -> int:
    model, tp = config.model, degrees.tp
    heads, kv_heads = model.heads // tp, (model.kv_heads or model.heads) // tp
    widths = {"hidden_dim": model.moe.hidden_dim // tp, "dense_hidden_dim": model.moe.dense_hidden_dim // tp}
    moe = model.moe.model_copy(update={**widths, "first_dense_layers": dense})
    size = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": model.head_width, "moe": moe}
    with torch.device("meta"):
        network = Transformer(model.model_copy(update=size), terms_of(config), getattr(torch, config.training.dtype))
        inputs = meta_inputs(network, config, degrees)
        network.comm = _TokenShards(tp)
        for block in network.blocks():
            block.comm = network.comm
        if mode == "none":
            parameters = {p.untyped_storage()._cdata for p in network.parameters()}
            kept: dict[int, torch.UntypedStorage] = {}

            def keep(x: Tensor) -> Tensor:
                storage = x.untyped_storage()
                if storage._cdata not in parameters:
                    kept[storage._cdata] = storage
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = network(inputs)
            del out
            return sum(storage.nbytes() for storage in kept.values())
        with _Outputs((CHOICES | PRODUCTS) if mode == "selective" else CHOICES) as outputs:
            network(inputs)
        return outputs.bytes + layers * inputs.tokens.numel() // tp * model.dim * torch.finfo(network.dtype).bits // 8


def meta_inputs(network: Transformer, config: Config, degrees: Degrees) -> Inputs:
    """One rank's micro-batch without storage."""
    size = micro_batch_size(config, degrees)
    shape = (size, config.training.seq_len // degrees.cp)
    ids = torch.empty(shape, dtype=torch.int64)
    weights = torch.empty(shape, dtype=accumulation_dtype(network.dtype))
    positions = torch.empty(shape[1], dtype=torch.int64)
    sequences = torch.empty(size, dtype=torch.int64)
    return Inputs(ids, ids, ids, ids, weights, sequences, torch.empty((), dtype=torch.int64), positions, 0.0)


def vocabulary(config: Config) -> tuple[int, str]:
    """The vocabulary size, without training a tokenizer."""
    if config.model.vocab_size:
        return config.model.vocab_size, "model.vocab_size"
    if not config.tokenizer.path:
        return config.tokenizer.vocab_size, "tokenizer.vocab_size"
    try:
        return read_tokenizer(config.tokenizer.path, "tokenizer.path").vocab_size, config.tokenizer.path
    except UserError as error:
        raise UserError(f"{error}; to plan without it, give --model.vocab_size={LLAMA_2_VOCABULARY}") from error
