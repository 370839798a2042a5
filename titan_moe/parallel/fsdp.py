"""FSDP2 and HSDP, one unit per block. Under expert parallelism a block's experts are sharded over a mesh of their own.

Gradients are summed over ranks, never averaged, because token weights already divide by the labelled tokens of the
global batch. So no mesh needs a gradient scale. Routers are replicated in float32 on every rank, because they are small
and their rounding decides which experts a token goes to; their gradients are summed at the end of a step.

No FSDP unit is nested in a block: its hooks would run again when the block is recomputed.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo
from torch.distributed.tensor import Shard

from titan_moe.errors import UserError
from titan_moe.model.gemm import local
from titan_moe.model.moe import Experts
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.norm import sum_gradients
from torchtitan_ext.dtypes import accumulation_dtype

# A parameter's shard on a mesh of its own. torch 2.11 has no such thing, so there ep is 1.
ShardOnMesh: Any = getattr(_fsdp_common, "ShardPlacementResult", None)


def apply_fsdp(model: Transformer, mesh: Mesh, reshard_after_forward: bool) -> None:
    """Applies `fully_shard` to every block and to the model, in place. Raises UserError for ep > 1 with torch 2.11."""
    assert mesh.dense is not None
    assert mesh.expert_dense is not None
    exact = accumulation_dtype(model.dtype)
    compute = None if model.dtype == exact else model.dtype
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=exact, cast_forward_inputs=False)
    if mesh.ep is not None and ShardOnMesh is None:
        raise UserError(
            f"parallelism.ep = {mesh.degrees.ep}: torch {torch.__version__} can't shard experts over a mesh of their own; "
            "install torch 2.13 or newer, or set it to 1"
        )
    expert_mesh = mesh_info(mesh.expert_dense) if mesh.ep is not None else None
    replicated = set(routers(model))
    for block in model.blocks():
        expert_dims = {} if block.moe is None else expert_dimensions(block.moe.experts, mesh.expert_dense.size(-1))

        def placement(parameter: nn.Parameter, expert_dims: dict[nn.Parameter, int] = expert_dims) -> Any:
            if parameter not in expert_dims:
                return None
            shard = Shard(expert_dims[parameter])
            return shard if expert_mesh is None else ShardOnMesh(shard, expert_mesh)

        fully_shard(
            block,
            mesh=mesh.dense,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=placement,
            ignored_params=replicated,
        )
    fully_shard(model, mesh=mesh.dense, mp_policy=policy, reshard_after_forward=False, ignored_params=replicated)
    for method in ("evaluate", "logits", "first_choices"):
        register_fsdp_forward_method(model, method)
    for block in model.blocks():
        register_fsdp_forward_method(block, "choose_experts")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def expert_dimensions(experts: Experts, ranks: int) -> dict[nn.Parameter, int]:
    """The dimension along which each weight of the experts is sharded over FSDP's ranks: the first that divides evenly.

    Whole experts come first, because gathering them copies nothing. A shard along another dimension is copied into place after
    every gather, so F of gate and up, and D of down, come next: a shard of them has long contiguous runs. ep and tp may already
    shard the same dimension. Dimension 0 where none divides evenly, with padding."""
    preferred = {experts.gate_up: (0, 2, 3), experts.down: (0, 1, 2)}
    return {
        weight: next((dim for dim in dims if local(weight).shape[dim] % ranks == 0), 0)
        for weight, dims in preferred.items()
    }


def mesh_info(mesh: DeviceMesh) -> FSDPMeshInfo:
    """A mesh (shard,) or (replicate, shard) in the form that FSDP takes for single parameters."""
    if mesh.ndim == 1:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)


def routers(model: Transformer) -> list[nn.Parameter]:
    """The parameters that every rank holds in full."""
    return [moe.router.weight for moe in model.moe_modules()]


@torch.no_grad()
def sum_router_gradients(model: Transformer, data_ranks: dist.ProcessGroup | None) -> None:
    """Sums the routers' gradients over the data ranks in one all-reduce; FSDP reduces all other gradients."""
    if data_ranks is not None:
        sum_gradients(routers(model), data_ranks)


def set_gradient_reduction(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; if not, they accumulate unsharded on this rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_is_last_backward(enabled)
