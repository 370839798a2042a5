"""FSDP2 and HSDP: a unit per block, one for its experts under expert parallelism, one for its router in bfloat16.

Gradients are summed over ranks, never averaged: the losses are already shares of the global batch. So no unit needs a factor,
whatever the mesh that it is sharded over.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh
from torchtitan_ext.gram import accumulation_dtype


def shard(model: Transformer, mesh: Mesh, expert_dim: int | None, reshard: bool) -> None:
    """Wraps the model in place. expert_dim: the dimension in which experts are sharded beside ep. reshard: after forward."""
    assert mesh.dense is not None
    assert mesh.expert_dense is not None
    exact = accumulation_dtype(model.dtype)
    compute = None if model.dtype == exact else model.dtype
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=exact, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(reduce_dtype=exact, cast_forward_inputs=False)

    def unit(module: nn.Module, over: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool, dim: int = 0) -> None:
        fully_shard(
            module, mesh=over, mp_policy=policy, reshard_after_forward=reshard, shard_placement_fn=lambda _: Shard(dim)
        )

    for block in model.layers.values():
        moe = getattr(block, "moe", None)
        if moe is not None and compute is not None:
            unit(moe.router, mesh.dense, whole, reshard)
        if moe is not None and mesh.ep is not None:
            assert expert_dim is not None
            unit(moe.experts, mesh.expert_dense, policy, reshard, expert_dim)
        fully_shard(block, mesh=mesh.dense, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh.dense, mp_policy=policy, reshard_after_forward=False)
    for method in ("evaluate", "logits"):
        register_fsdp_forward_method(model, method)
    for module in units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; otherwise it adds to what this rank keeps whole."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_is_last_backward(now)
