"""Loads a checkpoint's model for running it on one device or on several ranks, without gradients and without loss terms."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from titan_moe.checkpoint.dcp import load_checkpoint
from titan_moe.checkpoint.prepared import own_tokenizer
from titan_moe.checkpoint.resume import damage
from titan_moe.checkpoint.state import read_state
from titan_moe.config.tables import Config
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh, single
from titan_moe.parallel.replicated import replicate_tokens
from titan_moe.train.build import build_model
from torchtitan_ext.terms import Terms


class Loaded(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    config: Config
    step: int


def load_model(checkpoint: Path, config: Config, device: torch.device, mesh: Mesh | None = None) -> Loaded:
    """The model of a checkpoint and its tokenizer. Raises UserError.

    config: of `from_checkpoint`. mesh: of `inference_mesh`, over whose ranks the model is spread; None: the whole model is
    on this device, on every rank that calls this."""
    state = read_state(checkpoint, "checkpoint")
    tokenizer = own_tokenizer(config, state, checkpoint)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint}: its tokenizer is neither in the run directory nor in the cache; give --tokenizer.path"
        )
    mesh = mesh or single(device)
    problem = damage(checkpoint, mesh)
    if problem is not None:
        raise UserError(f"{checkpoint} is damaged: {problem}")
    model = build_model(config, tokenizer.vocab_size, mesh)
    replicate_tokens(model, mesh)
    load_checkpoint(checkpoint, model, None)
    prepare_for_inference(model)
    return Loaded(model, tokenizer, config, state.step)


def prepare_for_inference(model: Transformer) -> None:
    """Removes the loss terms, and rounds every weight once that a forward pass would round each time, in place."""
    model.requires_grad_(False)
    model.terms = Terms()
    for moe in model.moe_modules():
        moe.terms = model.terms
    for name, parameter in list(model.named_parameters()):
        if not name.endswith("router.weight"):  # routers compute in float32
            owner, _, last = name.rpartition(".")
            rounded = nn.Parameter(parameter.detach().to(model.dtype), requires_grad=False)
            setattr(model.get_submodule(owner), last, rounded)
