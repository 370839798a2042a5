"""Checks that need more than one key. They run before anything is built."""

import math
from collections.abc import Iterator

from titan_moe.config import extensions
from titan_moe.config.degrees import Origin, check_degrees, resolve
from titan_moe.config.tables import Config, Data
from titan_moe.errors import UserError
from titan_moe.runtime.gpus import gpu_here
from torchtitan_ext.terms import REGISTRY, ModelFacts

FLOAT8_MULTIPLE = 16
GROUPED_MULTIPLE = 8
NAME_BYTES = 255  # of a directory, on most file systems
LARGEST_TENSOR = 2**41  # numbers, 8 terabytes in float32


def check_config(config: Config, origin: Origin, world_size: int) -> None:
    """Raises UserError for a combination that can't work."""
    check_model(config, origin)
    check_sizes(config, origin)
    check_degrees(config, resolve(config.parallelism, world_size, origin), origin)
    check_regularizers(config, origin)
    check_float8(config, origin)
    if gpu_here():
        check_grouped_products(config, origin)
    check_start(config, origin)
    check_names(config, origin)
    if config.eval.every and config.parallelism.pp > 1:
        raise UserError(
            f"{origin('eval.every')} = {config.eval.every}: tasks are not run over pipeline stages; set it to 0, or "
            "parallelism.pp to 1"
        )


def check_model(config: Config, origin: Origin) -> None:
    model, moe = config.model, config.model.moe
    if moe.top_k > moe.experts:
        raise UserError(f"{origin('model.moe.top_k')} = {moe.top_k} is more than model.moe.experts = {moe.experts}")
    if model.head_dim == 0 and model.dim % model.heads:
        raise UserError(
            f"{origin('model.heads')} = {model.heads} does not divide model.dim = {model.dim}; "
            "change one of them or set model.head_dim"
        )
    if model.head_width % 2:
        raise UserError(
            f"{origin('model.head_dim')}: rotary embeddings need an even head width, not {model.head_width}"
        )
    if model.rotary_width % 2 or model.rotary_width == 0:
        raise UserError(
            f"{origin('model.rope_fraction')} = {model.rope_fraction}: rotary embeddings turn pairs of elements, and that "
            f"share of a head of {model.head_width} is {model.rotary_width}; choose a fraction that gives an even number"
        )
    if model.kv_heads and model.heads % model.kv_heads:
        raise UserError(f"{origin('model.kv_heads')} = {model.kv_heads} does not divide model.heads = {model.heads}")
    if moe.first_dense_layers > model.layers:
        raise UserError(
            f"{origin('model.moe.first_dense_layers')} = {moe.first_dense_layers} "
            f"is more than model.layers = {model.layers}"
        )
    if moe.dense_hidden_dim and not moe.first_dense_layers:
        raise UserError(
            f"{origin('model.moe.dense_hidden_dim')} = {moe.dense_hidden_dim}: the model has no dense layer; "
            "set model.moe.first_dense_layers, or this to 0"
        )
    if moe.shared_gate and not moe.shared_experts:
        raise UserError(
            f"{origin('model.moe.shared_gate')}: the model has no shared expert; set model.moe.shared_experts, or this to false"
        )


def check_sizes(config: Config, origin: Origin) -> None:
    """Raises UserError for a tensor that no machine can hold; torch's errors for it would not name the key."""
    model, moe, training = config.model, config.model.moe, config.training
    vocabulary = {"model.vocab_size": model.vocab_size or config.tokenizer.vocab_size}
    width = {"model.dim": model.dim}
    tokens = {"training.batch_size": training.batch_size, "training.seq_len": training.seq_len}
    heads = {"model.heads": model.heads, "model.head_dim": model.head_width}
    experts = {"model.moe.experts": moe.experts, "model.moe.hidden_dim": moe.hidden_dim}
    active = {"model.moe.hidden_dim": moe.hidden_dim, "model.moe.shared_experts": moe.shared_experts + moe.top_k}
    dense = {"model.moe.dense_hidden_dim": moe.dense_width}
    for other in (vocabulary, tokens, heads, experts, active, dense):
        sizes = other | width
        if math.prod(sizes.values()) > LARGEST_TENSOR:
            largest = max(sizes, key=lambda key: sizes[key])
            product = " * ".join(sizes)
            raise UserError(
                f"{origin(largest)} = {sizes[largest]:,} is too large: {product} would be more than 2^41 numbers"
            )


def check_regularizers(config: Config, origin: Origin) -> None:
    options = config.regularizers.options()
    for name in config.regularizers.measure:
        if name not in options:
            known = ", ".join(sorted(options))
            raise UserError(f"{origin('regularizers.measure')}: no term {name!r}; there are {known}")
    measured = config.regularizers.measure
    enabled = [name for name, table in options.items() if table.weight > 0 or name in measured]
    moe = config.model.moe
    moe_layers = config.model.layers - moe.first_dense_layers
    if enabled and moe_layers == 0:
        raise UserError(
            f"{origin('model.moe.first_dense_layers')}: the model has no MoE layer, but {', '.join(sorted(enabled))} need one; "
            "set their weights to 0"
        )
    for name in enabled:
        for option, problem in REGISTRY[name].problems(options[name], ModelFacts(moe.experts, moe.top_k, moe_layers)):
            raise UserError(f"{origin(f'regularizers.{name}.{option}')}: {problem}")


def without_effect(config: Config) -> Iterator[str]:
    """A warning for each setting that is allowed and does nothing, or leaves the router with less gradient than one expects."""
    yield from data_without_effect(config.data)
    moe, options = config.model.moe, config.regularizers.options()
    facts = ModelFacts(moe.experts, moe.top_k, config.model.layers - moe.first_dense_layers)
    if facts.moe_layers == 0:
        if config.balancer.rate:
            yield "balancer.rate has no effect: the model has no MoE layer"
        return
    if moe.top_k == 1 and moe.normalize_topk:
        yield (
            "model.moe.normalize_topk makes every gate 1 with model.moe.top_k = 1, so the router gets no gradient from the "
            "cross-entropy, only from loss terms; set it to false"
        )
    for name, table in options.items():
        reason = REGISTRY[name].without_effect(table, facts) if table.weight > 0 else None
        if reason:
            yield f"regularizers.{name}.weight has no effect: {reason} (model.moe.top_k = {moe.top_k} of {moe.experts})"
    if config.balancer.rate and moe.top_k == moe.experts:
        yield f"balancer.rate has no effect: every token goes to every expert (model.moe.top_k = {moe.top_k} of {moe.experts})"
    if config.balancer.center and not config.balancer.rate:
        yield "balancer.center has no effect while balancer.rate = 0"
    if config.float8.experts and not config.float8.enable:
        yield "float8.experts has no effect while float8.enable = false"


def data_without_effect(data: Data) -> Iterator[str]:
    """A warning for each option of [data] that is set and belongs to the other kind of corpus."""
    streamed = extensions.is_streamed(data.corpus)
    key, why = ("validation_fraction", "has its own split") if streamed else ("shuffle_tokens", "is not streamed")
    if getattr(data, key) != getattr(Data(), key):
        yield f"data.{key} has no effect: data.corpus = {data.corpus!r} {why}"


def check_float8(config: Config, origin: Origin) -> None:
    """Raises UserError for what torchao's products refuse: other types, and sizes that are no multiples of 16."""
    if not config.float8.enable:
        return
    if config.training.dtype != "bfloat16":
        raise UserError(
            f"{origin('float8.enable')}: float8 needs training.dtype = 'bfloat16', not {config.training.dtype!r}"
        )
    model, tp = config.model, config.parallelism.tp
    sizes = {"model.dim": model.dim, "queries: model.heads * head_dim": model.heads * model.head_width}
    sizes["keys and values: model.kv_heads * head_dim"] = (model.kv_heads or model.heads) * model.head_width
    if (
        config.float8.experts
        or model.moe.shared_experts
        or (model.moe.first_dense_layers and not model.moe.dense_hidden_dim)
    ):
        sizes["model.moe.hidden_dim"] = model.moe.hidden_dim
    if model.moe.dense_hidden_dim:
        sizes["model.moe.dense_hidden_dim"] = model.moe.dense_hidden_dim
    for name, size in sizes.items():
        part = size if name == "model.dim" else size // tp
        if part % FLOAT8_MULTIPLE:
            raise UserError(
                f"{origin('float8.enable')}: float8 products need multiples of {FLOAT8_MULTIPLE} on every rank, and {name} "
                f"is {size}{f' over parallelism.tp = {tp}' if part != size else ''}"
            )


def check_grouped_products(config: Config, origin: Origin) -> None:
    """Raises UserError for sizes that a GPU's grouped product refuses: rows of bfloat16 must be multiples of 16 bytes."""
    if config.training.dtype != "bfloat16" or config.model.layers == config.model.moe.first_dense_layers:
        return
    hidden, tp = config.model.moe.hidden_dim, config.parallelism.tp
    for key, size, ranks in (("model.dim", config.model.dim, 1), ("model.moe.hidden_dim", hidden, tp)):
        if size // ranks % GROUPED_MULTIPLE:
            over = f" / parallelism.tp = {ranks}" if ranks > 1 else ""
            up, step = -(-size // (ranks * GROUPED_MULTIPLE)) * ranks * GROUPED_MULTIPLE, ranks * GROUPED_MULTIPLE
            raise UserError(
                f"{origin(key)} = {size}{over}: the experts' products on a GPU need a multiple of {GROUPED_MULTIPLE} on every "
                f"rank; {up} or another multiple of {step} would do"
            )


def check_start(config: Config, origin: Origin) -> None:
    if config.checkpoint.expert_order and not config.checkpoint.load_path:
        raise UserError(
            f"{origin('checkpoint.expert_order')}: orders the experts of checkpoint.load_path, which is not set"
        )
    if not config.checkpoint.upcycle_path:
        return
    where = origin("checkpoint.upcycle_path")
    if config.checkpoint.load_path:
        raise UserError(f"{where}: weights come from there or from checkpoint.load_path, not from both")
    if config.model.moe.shared_experts:
        raise UserError(f"{where}: a dense layer has nothing for model.moe.shared_experts to start from; set that to 0")
    if config.model.moe.first_dense_layers:
        raise UserError(f"{where}: every layer becomes an MoE; set model.moe.first_dense_layers to 0")


def check_vocabulary(config: Config, pieces: int) -> None:
    """Checks the model's vocabulary against the tokenizer's number of pieces. Raises UserError."""
    size, tp = config.model.vocab_size or pieces, config.parallelism.tp
    if size < pieces:
        raise UserError(
            f"model.vocab_size = {size} is less than the tokenizer's {pieces} pieces; raise it or set it to 0"
        )
    if size % tp:
        better = -(-size // tp) * tp
        raise UserError(f"parallelism.tp = {tp} must divide the vocabulary of {size}; set model.vocab_size = {better}")


def check_names(config: Config, origin: Origin) -> None:
    name = config.optimizer.name
    if name not in extensions.optimizers:
        optimizers = ", ".join(sorted(extensions.optimizers))
        raise UserError(f"{origin('optimizer.name')}: no optimizer {name!r}; there are {optimizers}")
    known = ("tensorboard", *extensions.TRACKER_PACKAGES, *extensions.trackers)
    for name in config.metrics.trackers:
        if name not in known:
            raise UserError(
                f"{origin('metrics.trackers')}: no module of extensions.modules registers a tracker {name!r}; "
                f"there are {', '.join(known)}"
            )
    name = config.job.name
    if "/" in name or name in (".", "..") or not name.isprintable():
        raise UserError(f"{origin('job.name')} = {name!r} must be a plain name, without '/' and line ends")
    if len(name.encode()) > NAME_BYTES:
        raise UserError(
            f"{origin('job.name')} = '{name[:20]}...' is longer than the {NAME_BYTES} bytes of a file's name"
        )
