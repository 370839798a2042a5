"""Context parallelism: every rank holds part of each sequence and all-gathers the keys and values of all parts.

P ranks cut a sequence of S tokens into 2P pieces; rank r takes pieces r and 2P - 1 - r, which balances the cost of
causal attention. B sequences, S tokens, s = S / P of them on this rank, N numbers per token.
"""

from typing import Any

import torch
from torch import Tensor

from titan_moe.model.masks import Mask, Pieces, document_blocks, is_dense
from titan_moe.model.transformer import Inputs
from torchtitan_ext.collectives import Group, gathered, reduced


def token_indices(seq: int, ranks: int, rank: int, device: torch.device | None = None) -> Tensor:
    """Indices, in the sequence, of the tokens on a rank: (s,), ascending."""
    piece = seq // (2 * ranks)
    last = 2 * ranks - 1 - rank
    return torch.cat([torch.arange(n * piece, (n + 1) * piece, device=device) for n in (rank, last)])


def context_shard(inputs: Inputs, ranks: int, rank: int) -> Inputs:
    """The inputs restricted to this rank's tokens of every sequence."""
    if ranks == 1:
        return inputs
    indices_s = token_indices(inputs.tokens.shape[1], ranks, rank, inputs.tokens.device)
    names = ("tokens", "labels", "document_ids", "positions", "token_weights")
    parts = {name: getattr(inputs, name).index_select(1, indices_s) for name in names}
    return inputs._replace(sequence_positions=indices_s, **parts)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BsN: Tensor, order_S: Tensor, group: Group) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(order_S)
        return gathered(x_BsN, 1, group).index_select(1, order_S)

    @staticmethod
    def backward(ctx: Any, grad_BSN: Tensor) -> tuple[Tensor, None, None]:
        (order_S,) = ctx.saved_tensors
        exact = torch.promote_types(grad_BSN.dtype, torch.float32)  # sum the ranks' gradients before rounding
        by_rank = torch.empty_like(grad_BSN, dtype=exact, memory_format=torch.contiguous_format)
        by_rank[:, order_S] = grad_BSN.to(exact)
        return reduced(by_rank, 1, ctx.group).to(grad_BSN.dtype), None, None


class Context:
    """The communication that attention needs over a group of context-parallel ranks."""

    def __init__(self, group: Group) -> None:
        self.group = group

    @torch.compiler.disable
    def gather(self, x_BsN: Tensor) -> Tensor:
        """All-gathers sequences, in order: (B, s, N) -> (B, S, N). The backward reduce-scatters the gradients."""
        ranks = self.group.size()
        by_rank = [token_indices(x_BsN.shape[1] * ranks, ranks, rank, x_BsN.device) for rank in range(ranks)]
        order_S = torch.cat(by_rank).argsort()
        result: Tensor = _GatherSequence.apply(x_BsN, order_S, self.group)
        return result

    @torch.compiler.disable
    @torch.no_grad()
    def mask(self, indices_s: Tensor, document_ids_Bs: Tensor | None, dtype: torch.dtype = torch.float32) -> Mask:
        """Which pairs may attend, dense (1 or B, s, S) or in a GPU's forms. indices_s: this rank's tokens in the sequence."""
        ranks, seq = self.group.size(), len(indices_s) * self.group.size()
        dense = is_dense(indices_s.device, dtype)
        if document_ids_Bs is None:
            keys = torch.arange(seq, device=indices_s.device)
            return (keys <= indices_s.unsqueeze(1)).unsqueeze(0) if dense else pieces(seq, ranks, self.group.rank())
        documents_BS = self.gather(document_ids_Bs.unsqueeze(2)).squeeze(2)
        if not dense:
            return document_blocks(indices_s, document_ids_Bs, documents_BS)
        causal = torch.arange(seq, device=indices_s.device) <= indices_s.unsqueeze(1)
        return causal & (document_ids_Bs.unsqueeze(2) == documents_BS.unsqueeze(1))


def pieces(seq: int, ranks: int, rank: int) -> Pieces:
    """Where a rank's two pieces of a sequence end."""
    piece = seq // (2 * ranks)
    return Pieces(((rank + 1) * piece, (2 * ranks - rank) * piece))
