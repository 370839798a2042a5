"""Initializes a new run from a checkpoint, or from a dense checkpoint whose layers become experts (upcycling)."""

import logging
from operator import add
from pathlib import Path
from typing import Any

import torch

from titan_moe.checkpoint.changes import changed_keys
from titan_moe.checkpoint.dcp import load_checkpoint, read_tensors, tensors
from titan_moe.checkpoint.expert_order import permute_experts, read_order
from titan_moe.checkpoint.resume import damage
from titan_moe.checkpoint.run_dir import newest_of
from titan_moe.checkpoint.state import State, dump, read_state
from titan_moe.config.tables import Config, MoE
from titan_moe.errors import UserError
from titan_moe.model.init import draw_part, local_part
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh

log = logging.getLogger("titan_moe")


def start_from(model: Transformer, config: Config, tokenizer: str, mesh: Mesh) -> None:
    """Loads the weights that `checkpoint.load_path` or `checkpoint.upcycle_path` names, if any. Raises UserError.

    tokenizer: fingerprint of this run's; weights that were trained with another one are refused."""
    checkpoint = config.checkpoint
    if checkpoint.load_path:
        origin = f"checkpoint.load_path = {checkpoint.load_path!r}"
        path, state = open_checkpoint(checkpoint.load_path, origin, mesh)
        check_tokenizer(state, tokenizer, origin)
        different = changed_keys(state.model_table(origin), dump(config)["model"], "model.")
        if different:
            raise UserError(f"{origin}: a checkpoint of another model: {different[0]} differs")
        load_checkpoint(path, model, None)
        if checkpoint.expert_order:
            order = read_order(Path(checkpoint.expert_order), model.moe_layers, config.model.moe.experts)
            permute_experts(model, order)
        log.info(f"Starting from the weights of {path}")
    elif checkpoint.upcycle_path:
        origin = f"checkpoint.upcycle_path = {checkpoint.upcycle_path!r}"
        path, state = open_checkpoint(checkpoint.upcycle_path, origin, mesh)
        check_tokenizer(state, tokenizer, origin)
        check_dense(state.model_table(origin), config, origin)
        upcycle(model, path, checkpoint.upcycle_noise, config.job.seed)
        log.info(f"Starting from the dense weights of {path}, every expert a copy")


def check_tokenizer(state: State, tokenizer: str, origin: str) -> None:
    """Raises UserError when the weights belong to another tokenizer."""
    if state.tokenizer != tokenizer:
        raise UserError(
            f"{origin}: its weights belong to another tokenizer than tokenizer.path names; leave it out to take theirs"
        )


def open_checkpoint(given: str, origin: str, mesh: Mesh) -> tuple[Path, State]:
    """The checkpoint at a path, or the newest one when it is a run directory, and its state.json. Raises UserError."""
    path = newest_of(given)
    state = read_state(path, origin)
    problem = damage(path, mesh)
    if problem is not None:
        raise UserError(f"{origin}: {path} is damaged: {problem}")
    return path, state


def check_dense(saved: dict[str, Any], config: Config, origin: str) -> None:
    """Raises UserError when the layers of the checkpoint can't become this model's experts."""
    current = dump(config)["model"]
    dense, wanted = saved.pop("moe"), current.pop("moe")
    different = changed_keys(saved, current, "model.")
    if different:
        raise UserError(f"{origin}: a checkpoint of another model: {different[0]} differs")
    if dense["first_dense_layers"] != saved["layers"]:
        raise UserError(f"{origin}: not a dense model: its model.moe.first_dense_layers is not its model.layers")
    width = MoE.model_validate(dense).dense_width
    if width != wanted["hidden_dim"]:
        raise UserError(f"{origin}: its layers are {width} wide; model.moe.hidden_dim must be {width} to copy them")


def upcycle(model: Transformer, path: Path, noise: float, seed: int) -> None:
    """Copies the dense layer of every block into each of its experts, plus different normal noise for each, of `noise`
    times the weight's standard deviation. Routers stay as initialized. Source: Komatsuzaki et al. 2212.05055."""
    state = {name: value for name, value in tensors(model, None).items() if ".moe." not in name}
    read_tensors(path, state)
    with torch.no_grad():
        model.load_state_dict({name.removeprefix("model."): v for name, v in state.items()}, strict=False)
        for name, parameter in model.named_parameters():
            block, is_expert, part = name.partition(".moe.experts.")
            if not is_expert:
                continue
            shard, (first, *corner) = local_part(parameter)
            kinds = ("gate", "up") if part == "gate_up" else ("down",)
            dense_weights = {
                f"model.{block}.feed_forward.{kind}.weight": shard.new_empty(parameter.shape[-2:], device="cpu")
                for kind in kinds
            }
            read_tensors(path, dense_weights)
            full = torch.stack(list(dense_weights.values())).reshape(parameter.shape[1:])
            std = noise * float(full.std())
            for expert, target in enumerate(shard, start=first):
                expert_weight = full[tuple(map(slice, corner, map(add, corner, target.shape)))]
                if std:
                    key = f"{seed}/upcycle/{name}/{expert}"
                    expert_weight = expert_weight + draw_part(key, full.shape, std, corner, target.shape)
                target.copy_(expert_weight)
