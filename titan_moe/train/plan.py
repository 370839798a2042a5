"""`titan-moe plan`: what a configuration amounts to, from a model without weights."""

import torch

from titan_moe.config.tables import Config
from titan_moe.data.tokenizer import read_tokenizer
from titan_moe.errors import UserError
from titan_moe.model.counts import count, meta_model
from titan_moe.train.device import GIB

LLAMA_2_VOCABULARY = 32000


def plan_text(config: Config) -> str:
    """Parameters, FLOPs and the memory that does not depend on the batch, for one process."""
    vocab_size, source = vocabulary(config)
    settings = config.model.model_copy(update={"vocab_size": vocab_size})
    network = meta_model(settings, getattr(torch, config.training.dtype))
    counts = count(network, config.training.seq_len)
    moe = settings.moe
    tokens = config.training.batch_size * config.training.seq_len
    width = 8 if config.training.dtype == "float64" else 4
    rows = [
        ("vocabulary", f"{vocab_size:,} ({source})"),
        ("MoE layers", f"{network.moe_layers} of {settings.layers}"),
        ("experts per layer", f"{moe.experts} routed, {moe.top_k} active, {moe.shared_experts} shared"),
        ("parameters", f"{counts.total:,}"),
        ("active parameters", f"{counts.active:,}"),
        ("FLOPs per token", f"{counts.flops_per_token:,} (forward and backward)"),
        ("tokens per step", f"{tokens:,}"),
        ("tokens in all", f"{tokens * config.training.steps:,}"),
        ("FLOPs in all", f"{counts.flops_per_token * tokens * config.training.steps:.3g}"),
        ("parameters in memory", f"{counts.total * width / GIB:.2f} GiB"),
        ("gradients", f"{counts.total * width / GIB:.2f} GiB"),
        ("AdamW's moments", f"{2 * counts.total * width / GIB:.2f} GiB"),
        ("in all, without activations", f"{4 * counts.total * width / GIB:.2f} GiB"),
    ]
    return "\n".join(f"{name:<28} {value}" for name, value in rows)


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
