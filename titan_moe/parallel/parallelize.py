"""The one function between the plain network and the training loop. A dimension of size 1 costs nothing."""

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_moe.config.degrees import layers_per_stage, micro_steps
from titan_moe.config.tables import ActivationCheckpoint, Config
from titan_moe.model.float8 import use_float8
from titan_moe.model.moe import Experts
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.context import Context
from titan_moe.parallel.experts import AllToAll
from titan_moe.parallel.fsdp import shard
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.pipeline import Pipeline
from titan_moe.parallel.tensor import spread_tensors

# Saved in every mode: a flipped tie would send rows elsewhere in the backward pass than in the forward pass.
CHOICES = {torch.ops.aten.topk.default}
# Saved in mode "selective": what is dear to compute.
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.titan_moe.grouped_linear.default,
}


def parallelize(model: Transformer, config: Config, mesh: Mesh) -> None:
    """Spreads experts and sequences over ranks, then recomputation, compilation and sharding block by block, in place.

    Parameter names stay as they are. A model without weights (on the meta device) is sharded without ever being whole.
    """
    if mesh.pp is not None:
        steps = micro_steps(config, mesh.degrees)
        pipeline = Pipeline(
            model, layers_per_stage(config), config.parallelism.pp_schedule, mesh.pp, steps, mesh.degrees.tp
        )
        pipeline.keep_own()
        model.pipeline = pipeline
    if mesh.tp is not None:
        spread_tensors(model, mesh.tp)
    for moe in model.moe_modules():
        if mesh.expert_parts is not None:
            spread_experts(moe.experts, mesh.expert_parts)
        if mesh.ep is not None:
            moe.dispatcher = AllToAll(mesh.ep.get_group())
    if mesh.cp is not None:
        context = Context(mesh.cp)
        model.mask = context.mask
        for block in model.blocks():
            block.attention.gather = context.gather
    use_float8(model, config.float8, mesh.device)
    for block in model.blocks():
        recompute(block, config.activation_checkpoint)
        if config.compile.enable:
            block.compile()
    if mesh.dense is not None:
        shard(model, mesh, config.parallelism.reshard_after_forward)


def spread_experts(experts: Experts, parts: DeviceMesh) -> None:
    """Gives every rank of ep its experts, and every rank of tp its hidden units of them."""
    assert parts.mesh_dim_names is not None
    placements = [Shard({"ep": 0, "tp": 2}[name]) for name in parts.mesh_dim_names]
    for name, weight in list(experts.named_parameters()):
        own = distribute_tensor(weight.detach(), parts, placements, src_data_rank=None)
        setattr(experts, name, nn.Parameter(own))


def recompute(block: torch.nn.Module, settings: ActivationCheckpoint) -> None:
    """Wraps the block's forward in a non-reentrant checkpoint (the reentrant form loses the carry's gradients)."""
    if settings.mode == "none":
        return
    saved = CHOICES | PRODUCTS if settings.mode == "selective" else CHOICES

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001 - torch's signature
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    block.forward = functools.partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
