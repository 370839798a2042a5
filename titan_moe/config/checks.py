"""Checks that need more than one key. They run before anything is built."""

from titan_moe.config import extensions
from titan_moe.config.degrees import Origin, check_degrees, resolve
from titan_moe.config.tables import Config
from titan_moe.errors import UserError

FLOAT8_MULTIPLE = 16


def check_config(config: Config, origin: Origin, world_size: int) -> None:
    """Raises UserError for a combination that can't work."""
    extensions.load_modules(config.extensions.modules, origin("extensions.modules"))
    check_model(config, origin)
    check_parallelism(config, origin, world_size)
    check_regularizers(config, origin)
    check_float8(config, origin)
    check_start(config, origin)
    check_names(config, origin)


def check_model(config: Config, origin: Origin) -> None:
    model, moe = config.model, config.model.moe
    if moe.top_k > moe.experts:
        raise UserError(f"{origin('model.moe.top_k')} = {moe.top_k} is more than model.moe.experts = {moe.experts}")
    if model.head_dim == 0 and model.dim % model.heads:
        raise UserError(
            f"{origin('model.heads')} = {model.heads} does not divide model.dim = {model.dim}; "
            "change one of them or set model.head_dim"
        )
    head_dim = model.head_dim or model.dim // model.heads
    if head_dim % 2:
        raise UserError(f"{origin('model.head_dim')}: rotary embeddings need an even head width, not {head_dim}")
    if model.kv_heads and model.heads % model.kv_heads:
        raise UserError(f"{origin('model.kv_heads')} = {model.kv_heads} does not divide model.heads = {model.heads}")
    if moe.first_dense_layers > model.layers:
        raise UserError(
            f"{origin('model.moe.first_dense_layers')} = {moe.first_dense_layers} "
            f"is more than model.layers = {model.layers}"
        )


def check_parallelism(config: Config, origin: Origin, world_size: int) -> None:
    check_degrees(config, resolve(config.parallelism, world_size, origin), origin)


def check_regularizers(config: Config, origin: Origin) -> None:
    weights = config.regularizers.weights()
    known = {*weights, *extensions.regularizers}
    for name in config.regularizers.measure:
        if name not in known:
            raise UserError(f"{origin('regularizers.measure')}: no term {name!r}; there are {', '.join(sorted(known))}")
    for name in config.regularizers.custom:
        if name not in extensions.regularizers:
            raise UserError(
                f"{origin(f'regularizers.custom.{name}')}: no module of extensions.modules registers a "
                f"regularizer {name!r}"
            )
    wanted = {name for name, weight in weights.items() if weight > 0} | set(config.regularizers.measure)
    moe_layers = config.model.layers - config.model.moe.first_dense_layers
    if wanted and moe_layers == 0:
        terms = ", ".join(sorted(wanted))
        raise UserError(
            f"{origin('model.moe.first_dense_layers')}: the model has no MoE layer, but {terms} need one; "
            "set their weights to 0"
        )
    if "cp" in wanted and moe_layers == 1:
        raise UserError(f"{origin('regularizers.cp.weight')}: cp couples neighbouring MoE layers, the model has one")
    for name in ("sp", "o"):
        if name in wanted and config.model.moe.top_k == 1:
            raise UserError(
                f"{origin(f'regularizers.{name}.weight')}: {name} compares the experts of a token, and model.moe.top_k = 1; "
                "set the weight to 0"
            )
    if config.regularizers.sp.above_chance and config.regularizers.sp.method == "sketch":
        raise UserError(
            f"{origin('regularizers.sp.above_chance')}: a sketch knows no single cosine; set regularizers.sp.method to "
            "'exact' or 'sample'"
        )
    if config.regularizers.cp.form == "log" and config.regularizers.cp.source == "transition":
        raise UserError(
            f"{origin('regularizers.cp.form')}: 'log' takes each token's mass, which source = 'transition' has not"
        )
    for name in ("erc", "v"):
        if name in wanted and config.model.moe.experts == 1:
            raise UserError(
                f"{origin(f'regularizers.{name}.weight')}: {name} compares experts, and model.moe.experts = 1"
            )


def check_float8(config: Config, origin: Origin) -> None:
    """Raises UserError for what torchao's products refuse: other types, and sizes that are no multiples of 16."""
    if not config.float8.enable:
        return
    if config.training.dtype != "bfloat16":
        raise UserError(
            f"{origin('float8.enable')}: float8 needs training.dtype = 'bfloat16', not {config.training.dtype!r}"
        )
    model, tp = config.model, config.parallelism.tp
    head_dim = model.head_dim or model.dim // model.heads
    sizes = {"model.dim": model.dim, "queries: model.heads * head_dim": model.heads * head_dim}
    sizes["keys and values: model.kv_heads * head_dim"] = (model.kv_heads or model.heads) * head_dim
    if model.moe.shared_experts or model.moe.first_dense_layers:
        sizes["model.moe.hidden_dim"] = model.moe.hidden_dim
    for name, size in sizes.items():
        part = size if name == "model.dim" else size // tp
        if part % FLOAT8_MULTIPLE:
            raise UserError(
                f"{origin('float8.enable')}: float8 products need multiples of {FLOAT8_MULTIPLE} on every rank, and {name} "
                f"is {size}{f' over parallelism.tp = {tp}' if part != size else ''}"
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


def check_names(config: Config, origin: Origin) -> None:
    for name in config.metrics.trackers:
        if name not in extensions.trackers:
            raise UserError(
                f"{origin('metrics.trackers')}: no module of extensions.modules registers a tracker {name!r}"
            )
    if "/" in config.job.name or config.job.name in (".", ".."):
        raise UserError(f"{origin('job.name')} = {config.job.name!r} must be a plain name, without '/'")
