"""Run directories with a checkpoint of random weights, none of which is trivial, and what the model in them computes."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.commands import ROOT
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.checkpoint.saver import Saver
from titan_moe.checkpoint.state import FORMAT_VERSION, dump
from titan_moe.config.tables import Checkpoint, Config, Job, Model, MoE, Training
from titan_moe.data.tokenizer import Tokenizer, train_tokenizer
from titan_moe.model.init import init_weights
from titan_moe.model.transformer import Inputs, Transformer
from torchtitan_ext.terms import Terms

VOCABULARY = 400
SEQ = 64
STEP = 20

# Name -> options of the model, and whether balancing biases are not zero. Every variant has a Transformers architecture.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "softmax": ({}, False),
    "untied, wide heads, theta, dense": (
        {"tie_embeddings": False, "head_dim": 24, "rope_theta": 5e5, "first_dense_layers": 1},
        False,
    ),
    "renormalised": ({"normalize_topk": True, "norm_eps": 1e-6}, False),
    "one expert a token": ({"top_k": 1, "shared_experts": 1}, False),
    "one expert a token, renormalised": ({"top_k": 1, "normalize_topk": True}, False),
    "one expert a token, sigmoid": ({"top_k": 1, "score": "sigmoid", "normalize_topk": True}, True),
    "all experts": ({"top_k": 8, "qk_norm": True}, False),
    "renormalised, scaled, no shared kv heads": (
        {"normalize_topk": True, "route_scale": 1.5, "kv_heads": 0, "head_dim": 24},
        False,
    ),
    "renormalised, dense": ({"normalize_topk": True, "first_dense_layers": 1}, False),
    "shared, scaled, dense": ({"shared_experts": 2, "route_scale": 2.5, "first_dense_layers": 1}, False),
    "shared, renormalised": ({"shared_experts": 1, "normalize_topk": True, "tie_embeddings": False}, False),
    "qk_norm": ({"qk_norm": True, "head_dim": 24, "first_dense_layers": 1}, False),
    "qk_norm, renormalised": ({"qk_norm": True, "normalize_topk": True, "route_scale": 0.7}, False),
    "qk_norm, shared": ({"qk_norm": True, "shared_experts": 1}, False),
    "qk_norm, shared, renormalised": (
        {"qk_norm": True, "shared_experts": 2, "normalize_topk": True, "route_scale": 2.5, "head_dim": 24},
        False,
    ),
    "biased, renormalised": ({"normalize_topk": True, "first_dense_layers": 1}, True),
    "biased, renormalised, shared": (
        {"normalize_topk": True, "shared_experts": 2, "route_scale": 1.5, "tie_embeddings": False, "head_dim": 24},
        True,
    ),
    "sigmoid": ({"score": "sigmoid"}, False),
    "sigmoid, biased, shared, scaled": (
        {"score": "sigmoid", "normalize_topk": True, "shared_experts": 2, "route_scale": 2.5, "first_dense_layers": 1},
        True,
    ),
    "sigmoid, biased, qk_norm": (
        {"score": "sigmoid", "normalize_topk": True, "shared_experts": 1, "qk_norm": True, "head_dim": 24},
        True,
    ),
    "sigmoid, biased, untied, no shared": (
        {"score": "sigmoid", "tie_embeddings": False, "route_scale": 2.5, "qk_norm": True, "first_dense_layers": 1},
        True,
    ),
    "dense": ({"first_dense_layers": 3}, False),
    "dense, qk_norm": ({"first_dense_layers": 3, "qk_norm": True}, False),
}
# The same for models that GGUF does not have.
WITHOUT_GGUF: dict[str, tuple[dict[str, Any], bool]] = {
    "norms of whole projections": ({"qk_norm": "projection", "kv_heads": 2}, False),
    "biases, gated shared experts, dense width": (
        {"qkv_bias": True, "shared_experts": 2, "shared_gate": True, "first_dense_layers": 1, "dense_hidden_dim": 40},
        False,
    ),
    "biases": ({"qkv_bias": True, "normalize_topk": True, "route_scale": 2.0}, False),
    "half rotary, biases": (
        {"score": "sigmoid", "rope_fraction": 0.5, "qkv_bias": True, "first_dense_layers": 1, "dense_hidden_dim": 40},
        True,
    ),
}
# The same for models that only GGUF has.
WITHOUT_ARCHITECTURE: dict[str, tuple[dict[str, Any], bool]] = {
    "biased": ({}, True),
    "biased, shared, untied, dense": (
        {"shared_experts": 1, "tie_embeddings": False, "first_dense_layers": 1, "rope_theta": 5e5, "qk_norm": True},
        True,
    ),
    "biased, renormalised, qk_norm": ({"normalize_topk": True, "qk_norm": True}, True),
    "qk_norm, shared, dense": ({"qk_norm": True, "shared_experts": 1, "first_dense_layers": 1}, False),
}
OF_MOE = set(MoE.model_fields)


@functools.cache
def tokenizer() -> Tokenizer:
    """A tokenizer of VOCABULARY pieces, trained on source code and prose."""
    texts = [path.read_text() for path in sorted((ROOT / "titan_moe" / "data").glob("*.py"))]
    texts += ["The quick brown fox, déjà vu — 42 times.\r\n" * 40, "中文 и українська\t\n" * 40]
    return Tokenizer(train_tokenizer(texts, VOCABULARY), "test")


def settings(options: dict[str, Any], **more: Any) -> Model:
    """A tiny model. options: of [model] and [model.moe]."""
    values: dict[str, Any] = {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 2, "vocab_size": VOCABULARY, **more}
    moe: dict[str, Any] = {"experts": 8, "top_k": 2, "hidden_dim": 32}
    for name, value in options.items():
        (moe if name in OF_MOE else values)[name] = value
    return Model(**values, moe=MoE(**moe))


def random_model(model: Model, biased: bool, dtype: torch.dtype = torch.float32) -> Transformer:
    """Random weights, with norms that are not 1 and, if asked for, balancing biases that are not 0."""
    network = Transformer(model, Terms([]), dtype)
    init_weights(network, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
        for moe in network.moe_modules() if biased else []:
            moe.router.expert_bias.copy_(0.05 * torch.randn(model.moe.experts, generator=generator))
    return network


def write_run(
    folder: Path, network: Transformer, dtype: str = "float32", pieces: Tokenizer | None = None, rank: int = 0
) -> Path:
    """A run directory in `folder` with one checkpoint of the network, without optimizer state; a collective of its ranks."""
    pieces = pieces or tokenizer()
    config = Config(
        job=Job(name="run", output_dir=str(folder)),
        model=network.settings,
        training=Training(seq_len=SEQ, dtype=dtype),  # type: ignore[arg-type]
    )
    run = RunDir(config, rank)
    run.open()
    facts = {
        "format_version": FORMAT_VERSION,
        "titan_moe": "0",
        "torch": torch.__version__,
        "config": dump(config),
        "data": "",
        "tokenizer": pieces.fingerprint,
        "scales": None,
        "norms": [],
        "skipped": 0,
    }
    Saver(run, network, None, Checkpoint()).save(STEP, facts)  # type: ignore[arg-type]
    if rank != 0:
        return run.path
    run.write_tokenizer(pieces.model)
    row = {"kind": "validation", "step": STEP, "loss": 5.25, "perplexity": 190.6, "bits_per_byte": 2.125}
    run.metrics.write_text(json.dumps(row) + "\n")
    run.write_config(config)
    run.close()
    return run.path


def tokens(sequences: int = 2, length: int = 48) -> Tensor:
    """Random ids (sequences, length) of ordinary pieces."""
    return torch.randint(4, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(network: Transformer, ids: Tensor) -> Tensor:
    """(B, S, V) of our model."""
    sequences, length = ids.shape
    positions = torch.arange(length)
    return network.logits(
        Inputs(
            ids,
            ids.roll(-1, 1),
            torch.zeros_like(ids),
            positions.expand(sequences, length),
            torch.full((sequences, length), 1 / ids.numel()),
            torch.arange(sequences),
            torch.tensor(0),
            positions,
        )
    )


def greedy(network: Transformer, ids: list[int], count: int) -> list[int]:
    """The `count` most probable tokens after `ids`, each computed from the whole text."""
    text = list(ids)
    for _ in range(count):
        text.append(int(logits(network, torch.tensor([text]))[0, -1].argmax()))
    return text[len(ids) :]
