"""A model on tensor- and expert-parallel ranks that all have the same tokens: for generating text, one new token at a time.

Training shards the hidden states over tp ranks by tokens, and every ep rank has tokens of its own. A single new token can't be
shared out, so here every rank has all tokens: partial sums of tp ranks are all-reduced, and each ep rank computes the rows of
its own experts, whose outputs are summed over the ranks. Weights that neither shards (with ep alone, all but the experts') are
on every rank. There is no FSDP, which would gather every weight anew for every token. Forward only.
"""

import torch
from torch import Tensor

from titan_moe.model.attention import ProjectionNorm
from titan_moe.model.moe import Dispatcher, MoELayer, Routed, plan_dispatch
from titan_moe.model.transformer import Block, Transformer
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.tensor import GroupTPComm
from torchtitan_ext.collectives import Group, all_sum
from torchtitan_ext.ops.routing import gates_by_row


class ReplicatedTokensComm(GroupTPComm):
    """Tensor-parallel communication with all tokens on every rank."""

    def gather_sequence(self, x: Tensor) -> Tensor:
        return x

    def gather_sequence_replicated(self, x: Tensor) -> Tensor:
        return x

    def reduce_scatter_sequence(self, x: Tensor) -> Tensor:
        return all_sum(x, self.group)


class OwnExperts(Dispatcher):
    """Rows of this rank's experts only, of tokens that every rank has."""

    local = False

    def __init__(self, group: Group) -> None:
        self.group = group

    @torch.compiler.disable
    def dispatch(
        self,
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        gates_TK: Tensor,
        experts: int,
        sampled_N: Tensor | None = None,  # noqa: ARG002 - the interface
    ) -> Routed:
        plan = plan_dispatch(topk_ids_TK, experts)
        here = experts // self.group.size()
        first = self.group.rank() * here
        ends = [0, *plan.offsets_E.tolist()]
        start, end = ends[first], ends[first + here]
        tokens = plan.tokens_R[start:end]
        offsets = plan.offsets_E[first : first + here] - start
        return Routed(
            x_TD.index_select(0, tokens), offsets, gates_by_row(gates_TK, plan.rows_TK)[start:end], plan, tokens
        )

    @torch.compiler.disable
    def combine(self, y_RD: Tensor, routed: Routed) -> Tensor:
        exact = torch.promote_types(y_RD.dtype, torch.float32)
        out_TD = y_RD.new_zeros(routed.plan.rows_TK.shape[0], y_RD.shape[1], dtype=exact)
        rows_RD = y_RD.to(exact) if routed.gates is None else y_RD.to(exact) * routed.gates.unsqueeze(1).to(exact)
        out_TD.index_add_(0, routed.route, rows_RD)
        return all_sum(out_TD, self.group).to(y_RD.dtype)


def without_fsdp(mesh: Mesh) -> Mesh:
    """The same mesh, over whose data ranks `parallelize` does not shard weights."""
    mesh.dense = mesh.expert_dense = None
    return mesh


def replicate_tokens(model: Transformer, mesh: Mesh) -> None:
    """Changes a model that was parallelized over a mesh of `without_fsdp`, in place: all ranks now take the same tokens."""
    comm = None if mesh.tp is None else ReplicatedTokensComm(mesh.tp.get_group())
    for module in model.modules():
        if comm is not None and isinstance(module, (Transformer, Block, MoELayer, ProjectionNorm)):
            module.comm = comm
        if mesh.ep is not None and isinstance(module, MoELayer):
            module.dispatcher = OwnExperts(mesh.ep.get_group())
