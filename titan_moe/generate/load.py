"""Loads a checkpoint's model for running it, on one rank or several, without gradients and without loss terms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from titan_moe.checkpoint.dcp import load_checkpoint
from titan_moe.checkpoint.prepared import own_tokenizer
from titan_moe.checkpoint.resume import damage
from titan_moe.checkpoint.state import read_state
from titan_moe.config.tables import Config
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.replicated import replicate_tokens
from titan_moe.train.build import build_model
from torchtitan_ext.carry import Carry
from torchtitan_ext.terms import LayerView, Terms
from torchtitan_ext.terms.base import Probes


class Loaded(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    config: Config
    step: int
    mesh: Mesh


def load_model(checkpoint: Path, config: Config, mesh: Mesh, same_tokens: bool = False) -> Loaded:
    """The model of a checkpoint, spread over the ranks of a mesh, and its tokenizer. Raises UserError.

    config: of `from_checkpoint`. same_tokens: all ranks of the mesh, one of `inference_mesh`, will take the same tokens;
    else each data rank has its own, as in training."""
    state = read_state(checkpoint, "checkpoint")
    tokenizer = own_tokenizer(config, state, checkpoint)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint}: its tokenizer is neither in the run directory nor in the cache; give --tokenizer.path"
        )
    problem = damage(checkpoint, mesh)
    if problem is not None:
        raise UserError(f"{checkpoint} is damaged: {problem}")
    model = build_model(config, tokenizer.vocab_size, mesh)
    if same_tokens:
        replicate_tokens(model, mesh)
    load_checkpoint(checkpoint, model, None)
    prepare_for_inference(model, whole=mesh.dense is None)
    return Loaded(model, tokenizer, config, state.step, mesh)


class _NoTerms(Terms):
    """Computes no measures either."""

    def add(self, view: LayerView, observed: Mapping[str, Any], probes: Probes | None, carry: Carry) -> Carry:  # noqa: ARG002
        return carry


def prepare_for_inference(model: Transformer, whole: bool = True) -> None:
    """Removes the loss terms, in place, and rounds every weight once that a forward pass would round each time.

    whole: False for weights in FSDP's shards, which it rounds as it gathers them."""
    model.requires_grad_(False)
    model.terms = _NoTerms()
    for moe in model.moe_modules():
        moe.terms = model.terms
    if not whole:
        return
    for name, parameter in list(model.named_parameters()):
        if not name.endswith("router.weight"):  # routers compute in float32
            owner, _, last = name.rpartition(".")
            rounded = nn.Parameter(parameter.detach().to(model.dtype), requires_grad=False)
            setattr(model.get_submodule(owner), last, rounded)
