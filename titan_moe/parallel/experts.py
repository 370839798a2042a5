"""Expert parallelism: experts are spread over the ranks of `ep`, tokens travel to them and back.

T tokens of this rank, K experts per token, R = T * K rows; J experts of this rank, Q rows that they receive; P ranks.

Rows leave sorted by expert, hence by rank, and arrive sorted by (source rank, expert); one permutation sorts them by expert.
What sp needs of the activations comes home like the outputs: the rows of the tokens that it looks at, and no others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_moe.model.moe import Dispatcher, Routed, gather_tokens, plan_dispatch
from torchtitan_ext.collectives import Group, exchange, gather_columns
from torchtitan_ext.ops.gram import token_gram
from torchtitan_ext.terms import GramRows, Sketches


class Route(NamedTuple):
    """Who sends how many rows to whom."""

    send: list[int]
    """Rows that this rank's tokens send to each rank."""
    receive: list[int]
    """Rows that this rank's experts get from each rank."""
    order_Q: Tensor
    """Place among the received rows of each row sorted by expert."""
    places_Q: Tensor
    """The inverse: place in expert order of each received row."""


class _Permute(torch.autograd.Function):
    """Rows in another order; the backward is the inverse permutation, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class AllToAll(Dispatcher):
    """Uneven all-to-all over the ranks that share the experts."""

    def __init__(self, group: Group) -> None:
        self.group = group

    @torch.compiler.disable
    def dispatch(self, x_TD: Tensor, topk_ids_TK: Tensor, experts: int) -> Routed:
        home = plan_dispatch(topk_ids_TK, experts)
        route, offsets_J = self.plan(home.offsets_E)
        arrived_QD = exchange(gather_tokens(x_TD, home), route.send, route.receive, self.group)
        return Routed(_Permute.apply(arrived_QD, route.order_Q, route.places_Q), offsets_J, home, route)

    def plan(self, offsets_E: Tensor) -> tuple[Route, Tensor]:
        """The route, and the end of each own expert's rows, from those of this rank's tokens over all experts."""
        ranks = self.group.size()
        counts_PJ = offsets_E.diff(prepend=offsets_E.new_zeros(1)).to(torch.int64).reshape(ranks, -1)
        arriving_PJ = torch.empty_like(counts_PJ)
        dist.all_to_all_single(arriving_PJ, counts_PJ, group=self.group)
        send, receive = torch.stack([counts_PJ.sum(1), arriving_PJ.sum(1)]).tolist()
        own = arriving_PJ.shape[1]
        expert_Q = torch.arange(own, device=offsets_E.device).repeat(ranks).repeat_interleave(arriving_PJ.flatten())
        order_Q = expert_Q.argsort(stable=True)
        places_Q = torch.empty_like(order_Q).scatter_(0, order_Q, torch.arange(len(order_Q), device=order_Q.device))
        return Route(send, receive, order_Q, places_Q), arriving_PJ.sum(0).cumsum(0).to(torch.int32)

    @torch.compiler.disable
    def outputs(self, y_RD: Tensor, routed: Routed) -> Tensor:
        route = routed.route
        return exchange(_Permute.apply(y_RD, route.places_Q, route.order_Q), route.receive, route.send, self.group)

    @torch.compiler.disable
    def sketches(
        self, z_RF: Tensor, keys_T: Tensor, routed: Routed, make: Callable[[Tensor, Tensor], Sketches]
    ) -> Sketches:
        route = routed.route
        keys_R = keys_T.index_select(0, routed.home.tokens_R)
        keys_Q = exchange(keys_R.to(torch.int32), route.send, route.receive, self.group).to(torch.int64) & 0xFFFFFFFF
        found = make(z_RF, keys_Q.index_select(0, route.order_Q))
        return Sketches(self.outputs(found.sketched_RM, routed), self.outputs(found.norms_R, routed))

    def activations(self, z_RF: Tensor, routed: Routed) -> Tensor:
        return self.outputs(z_RF, routed)

    @torch.compiler.disable
    def gram(self, z_RF: Tensor, chosen: GramRows, routed: Routed) -> tuple[Tensor, Tensor]:
        if chosen.whole:
            return z_RF, token_gram(self.outputs(z_RF, routed), chosen.rows_NK)
        z_home, places_R = self.some_activations(z_RF, chosen.rows_NK, routed)
        return z_RF, token_gram(z_home, places_R[chosen.rows_NK])

    def some_activations(self, z_RF: Tensor, rows_NK: Tensor, routed: Routed) -> tuple[Tensor, Tensor]:
        """z of the given home rows, and for every home row its place in it."""
        route = routed.route
        wanted_R = torch.zeros(routed.home.tokens_R.shape[0], dtype=torch.bool, device=z_RF.device)
        wanted_R[rows_NK.flatten()] = True
        asked_Q = exchange(wanted_R.to(torch.uint8), route.send, route.receive, self.group).bool()
        to_send = [part.sum() for part in asked_Q.split(route.receive)]
        counts = torch.stack(to_send + [part.sum() for part in wanted_R.split(route.send)]).tolist()
        send, receive = counts[: len(to_send)], counts[len(to_send) :]
        chosen = route.places_Q[asked_Q]  # rows of z in expert order, listed in the order of arrival
        z_home = exchange(z_RF.index_select(0, chosen), send, receive, self.group)
        return z_home, wanted_R.cumsum(0) - 1

    def response(self, response_EJ: Tensor) -> Tensor:
        return gather_columns(response_EJ, self.group)
