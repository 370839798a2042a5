"""The one function between the plain network and the training loop. A mesh dimension of size 1 changes nothing."""

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_moe.config.tables import ActivationCheckpoint, Config
from titan_moe.model.float8 import use_float8
from titan_moe.model.moe import Experts
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.compilation import compile_blocks, compiles
from titan_moe.parallel.context import Context
from titan_moe.parallel.experts import AllToAll
from titan_moe.parallel.fsdp import apply_fsdp, sum_router_gradients
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.pipeline import PipelineRunner, drop_other_stages, sum_tied_gradients
from titan_moe.parallel.runner import Runner
from titan_moe.parallel.tensor import apply_tensor_parallel, sum_norm_gradients

# Saved in every mode: a top-k tie that falls the other way in the recomputation would send rows to other experts.
CHOICES = {torch.ops.aten.topk.default, torch.ops.torchtitan_ext.choose_experts.default}
# Saved in mode "selective": operations that are expensive to recompute.
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch._higher_order_ops.flex_attention,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_grouped_mm.default,
    torch.ops.titan_moe.grouped_linear.default,
    torch.ops.torchtitan_ext.all_to_all.default,
}


def parallelize(model: Transformer, config: Config, mesh: Mesh) -> None:
    """Applies the mesh's parallel dimensions, then recomputation, compilation and FSDP per block, in place.

    Parameter names stay as they are. A model on the meta device is sharded without ever being allocated in full.
    """
    if mesh.pp is not None:
        drop_other_stages(model, config, mesh.pp)
    if mesh.tp is not None:
        apply_tensor_parallel(model, mesh.tp)
    for moe in model.moe_modules():
        if mesh.expert_shards is not None:
            shard_experts(moe.experts, mesh.expert_shards)
        if mesh.ep is not None:
            moe.dispatcher = AllToAll(mesh.ep.get_group())
    if mesh.cp is not None:
        context = Context(mesh.cp)
        model.make_mask = context.mask
        for block in model.blocks():
            block.attention.gather = context.gather
    use_float8(model, config.float8, mesh.device)
    for block in model.blocks():
        recompute(block, config.activation_checkpoint)
    if compiles(config.compile, mesh.device):
        compile_blocks(model.blocks())
    if mesh.dense is not None:
        apply_fsdp(model, mesh, config.parallelism.reshard_after_forward)


def build_runner(model: Transformer, config: Config, mesh: Mesh) -> Runner:
    """What runs microbatches through a parallelized model; call it once per model."""
    return Runner(model, config) if mesh.pp is None else PipelineRunner(model, config, mesh)


def sum_replicated_gradients(model: Transformer, mesh: Mesh) -> None:
    """Sums, once per step, the gradients of parameters that several ranks hold and FSDP does not reduce."""
    sum_router_gradients(model, mesh.ranks.data)
    sum_norm_gradients(model, mesh.tp)
    sum_tied_gradients(model, mesh.pp)


def shard_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Shards the experts over ep and their hidden units over tp, in place."""
    assert mesh.mesh_dim_names is not None
    placements = [Shard({"ep": 0, "tp": 2}[name]) for name in mesh.mesh_dim_names]
    for name, weight in list(experts.named_parameters()):
        sharded = distribute_tensor(weight.detach(), mesh, placements, src_data_rank=None)
        setattr(experts, name, nn.Parameter(sharded))


def recompute(block: torch.nn.Module, settings: ActivationCheckpoint) -> None:
    """Wraps the block's forward in a non-reentrant checkpoint (the reentrant form loses the carry's gradients)."""
    if settings.mode == "none":
        return
    saved = CHOICES | PRODUCTS if settings.mode == "selective" else CHOICES

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001 - torch's signature
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    forward = block.forward

    # A plain function, which Dynamo traces together with the checkpoint in it: outside of the compiled frame, the checkpoint
    # would keep the whole block from being compiled.
    def recomputed(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    block.forward = recomputed
