"""FSDP2 and HSDP, a unit per block. Under expert parallelism a block's experts are sharded over a mesh of their own.

Gradients are summed over ranks, never averaged: the losses are already shares of the global batch. So nothing needs a factor,
whatever the mesh that it is sharded over. Routers stay whole and in float32 on every rank, as they are small and their
precision decides who goes where; their gradients are summed at the end of a step.

No unit is nested in a block: its hooks would run inside what is recomputed.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard

from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.norm import sum_gradients
from torchtitan_ext.dtypes import accumulation_dtype


def shard(model: Transformer, mesh: Mesh, reshard: bool) -> None:
    """Wraps the model in place. reshard: after forward."""
    assert mesh.dense is not None
    assert mesh.expert_dense is not None
    exact = accumulation_dtype(model.dtype)
    compute = None if model.dtype == exact else model.dtype
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=exact, cast_forward_inputs=False)
    experts = mesh_info(mesh.expert_dense) if mesh.ep is not None else None
    # In the model's width, where that is even: experts are few, and ep and tp cut the other dimensions.
    even = model.settings.dim % mesh.expert_dense.size(-1) == 0
    whole = set(routers(model))
    for block in model.blocks():
        own = {} if block.moe is None else {block.moe.experts.gate_up: 3, block.moe.experts.down: 1}

        def placement(
            parameter: nn.Parameter, own: dict[nn.Parameter, int] = own
        ) -> Shard | ShardPlacementResult | None:
            if parameter not in own:
                return None
            dimension = Shard(own[parameter] if even else 0)
            return dimension if experts is None else ShardPlacementResult(dimension, experts)

        fully_shard(
            block,
            mesh=mesh.dense,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=placement,
            ignored_params=whole,
        )
    fully_shard(model, mesh=mesh.dense, mp_policy=policy, reshard_after_forward=False, ignored_params=whole)
    for method in ("evaluate", "logits", "run_stage"):
        register_fsdp_forward_method(model, method)
    for module in units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def mesh_info(mesh: DeviceMesh) -> FSDPMeshInfo:
    """A mesh (shard,) or (replicate, shard) as FSDP wants it for single parameters."""
    if mesh.ndim == 1:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)


def routers(model: Transformer) -> list[nn.Parameter]:
    """The parameters that every rank holds whole."""
    return [moe.router.weight for moe in model.moe_modules()]


@torch.no_grad()
def sum_router_gradients(model: Transformer, mesh: Mesh) -> None:
    """Over all ranks, in one go; FSDP sums all others."""
    if mesh.ranks.data is not None:
        sum_gradients(routers(model), mesh.ranks.data)


def units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; otherwise it adds to what this rank keeps whole."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_is_last_backward(now)
