"""Loads a checkpoint's model for running it, on one rank or several, without gradients and without loss terms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from titan_moe.checkpoint.dcp import load_checkpoint
from titan_moe.checkpoint.expert_order import Order, permute_experts, read_order
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
    placed: bool = False
    """Whether the ranks hold the experts that a placement file names."""


def load_model(
    checkpoint: Path, config: Config, mesh: Mesh, same_tokens: bool = False, placement: Path | None = None
) -> Loaded:
    """The model of a checkpoint, spread over the ranks of a mesh, and its tokenizer. Raises UserError.

    config: of `from_checkpoint`. same_tokens: all ranks of the mesh, one of `inference_mesh`, will take the same tokens;
    else each data rank has its own, as in training. placement: a file of `titan-moe place`: each rank of `ep` holds the experts
    that it names, which changes no output."""
    state = read_state(checkpoint, "checkpoint")
    tokenizer = own_tokenizer(config, state, checkpoint)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint}: its tokenizer is neither in the run directory nor in the cache; give --tokenizer.path"
        )
    problem = damage(checkpoint, mesh)
    if problem is not None:
        raise UserError(f"{checkpoint} is damaged: {problem}")
    order = None if placement is None else order_for(mesh, placement, config)
    model = build_model(config, tokenizer.vocab_size, mesh)
    if same_tokens:
        replicate_tokens(model, mesh)
    load_checkpoint(checkpoint, model, None)
    if order is not None:
        permute_experts(model, order)
    prepare_for_inference(model, whole=mesh.dense is None)
    return Loaded(model, tokenizer, config, state.step, mesh, order is not None)


def order_for(mesh: Mesh, path: Path, config: Config) -> Order:
    """The order of experts (L, E) in a placement file, for the ranks of a mesh. Raises UserError."""
    degrees, moe = mesh.degrees, config.model.moe
    if degrees.ep == 1:
        raise UserError(
            "--placement: parallelism.ep is 1, so every rank has all experts; start several ranks and give --parallelism.ep"
        )
    if degrees.cp > 1:
        raise UserError(
            f"--placement: parallelism.cp is {degrees.cp}, so ranks with different experts share a sequence; leave it at 1"
        )
    return read_order(path, config.model.layers - moe.first_dense_layers, moe.experts, "--placement", degrees.ep)


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
