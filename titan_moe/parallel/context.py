"""Context parallelism: every rank holds parts of the same sequences, and gathers the keys and values of all parts.

P ranks cut a sequence of S tokens into 2P pieces; rank r takes pieces r and 2P - 1 - r, so that causal attention costs each
the same. B sequences, S tokens, s = S / P of them here, G key-value heads, d head width.
"""

from typing import Any

import torch
from torch import Tensor

from titan_moe.model.transformer import Inputs
from torchtitan_ext.collectives import Group, gathered, reduced


def places(seq: int, ranks: int, rank: int) -> Tensor:
    """Where the tokens of a rank stand in their sequence: (s,), rising."""
    piece = seq // (2 * ranks)
    last = 2 * ranks - 1 - rank
    return torch.cat([torch.arange(n * piece, (n + 1) * piece) for n in (rank, last)])


def take_part(inputs: Inputs, ranks: int, rank: int) -> Inputs:
    """This rank's tokens of every sequence."""
    if ranks == 1:
        return inputs
    mine = places(inputs.tokens.shape[1], ranks, rank).to(inputs.tokens.device)
    names = ("tokens", "labels", "document_ids", "positions", "token_weights")
    parts = {name: getattr(inputs, name).index_select(1, mine) for name in names}
    return inputs._replace(places=mine, **parts)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BsN: Tensor, order_S: Tensor, group: Group) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(order_S)
        return gathered(x_BsN, 1, group).index_select(1, order_S)

    @staticmethod
    def backward(ctx: Any, grad_BSN: Tensor) -> tuple[Tensor, None, None]:
        (order_S,) = ctx.saved_tensors
        exact = torch.promote_types(grad_BSN.dtype, torch.float32)  # ranks' shares are summed before they are rounded
        by_rank = torch.empty_like(grad_BSN, dtype=exact, memory_format=torch.contiguous_format)
        by_rank[:, order_S] = grad_BSN.to(exact)
        return reduced(by_rank, 1, ctx.group).to(grad_BSN.dtype), None, None


class Context:
    """What attention needs of the other ranks."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def order(self, seq: int) -> Tensor:
        """Place among the gathered tokens of each token of the sequence: (S,)."""
        ranks = self.group.size()
        return torch.cat([places(seq, ranks, rank) for rank in range(ranks)]).argsort()

    @torch.compiler.disable
    def gather(self, x_BsN: Tensor) -> Tensor:
        """Values of the whole sequences, in order: (B, s, N) -> (B, S, N). The backward sums what all ranks made of them."""
        order = self.order(x_BsN.shape[1] * self.group.size()).to(x_BsN.device)
        result: Tensor = _GatherSequence.apply(x_BsN, order, self.group)
        return result

    @torch.compiler.disable
    @torch.no_grad()
    def mask(self, places_s: Tensor, document_ids_Bs: Tensor | None) -> Tensor:
        """Which (query, key) pairs may attend: (1 or B, s, S) bool."""
        keys = torch.arange(len(places_s) * self.group.size(), device=places_s.device)
        causal = (keys <= places_s.unsqueeze(1)).unsqueeze(0)
        if document_ids_Bs is None:
            return causal
        return causal & (
            document_ids_Bs.unsqueeze(2) == self.gather(document_ids_Bs.unsqueeze(2)).squeeze(2).unsqueeze(1)
        )
