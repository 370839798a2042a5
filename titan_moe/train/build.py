"""Builds a model on its ranks from a configuration."""

import torch

from titan_moe.config.tables import Config
from titan_moe.model.init import init_weights
from titan_moe.model.terms import terms_of
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.parallelize import parallelize


def build_model(config: Config, tokenizer_vocab: int, mesh: Mesh) -> Transformer:
    """The parallelized model with its initial weights; no rank ever allocates more than its own shards."""
    vocab_size = config.model.vocab_size or tokenizer_vocab
    settings = config.model.model_copy(update={"vocab_size": vocab_size})
    with torch.device("meta"):
        model = Transformer(settings, terms_of(config, mesh.ranks), getattr(torch, config.training.dtype))
    parallelize(model, config, mesh)
    model.to_empty(device=mesh.device)
    init_weights(model, config.job.seed)
    return model
