"""Expert parallelism: experts are sharded over the ranks of `ep`; tokens are sent to their ranks and outputs back.

T tokens of this rank, K experts per token, R = T * K rows; J experts of this rank, Q rows that they receive; P ranks.

Rows are sent sorted by expert, hence by rank, and arrive sorted by (source rank, expert); one permutation sorts them by expert.
Gate weights travel with the rows and are applied at the experts, so that combining only sums. What a term needs of the
activations is sent back like the outputs: all rows, or only those of the tokens that it samples.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_moe.model.moe import Dispatcher, Routed, gather_tokens, plan_dispatch, sum_rows
from torchtitan_ext.collectives import Group, exchange, gather_columns


class Route(NamedTuple):
    """How many rows go to and come from each rank, and their order here."""

    send: list[int]
    """Rows that this rank's tokens send to each rank."""
    receive: list[int]
    """Rows that this rank's experts get from each rank."""
    order_Q: Tensor
    """`received[order_Q]` is sorted by expert."""
    inverse_Q: Tensor
    """The inverse permutation: index among the rows sorted by expert of each received row."""


class _Permute(torch.autograd.Function):
    """Permutes rows. The backward applies the inverse permutation, which is faster than a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _ApplyGates(torch.autograd.Function):
    """Rows times their gate weights. The gates' gradient is summed in their own dtype, at least float32."""

    @staticmethod
    def forward(ctx: Any, y_QD: Tensor, gates_Q: Tensor) -> Tensor:
        ctx.save_for_backward(y_QD, gates_Q)
        return y_QD * gates_Q.unsqueeze(1).to(y_QD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_QD: Tensor) -> tuple[Tensor, Tensor]:
        y_QD, gates_Q = ctx.saved_tensors
        grad_gates_Q = torch.linalg.vecdot(grad_QD.to(gates_Q.dtype), y_QD.to(gates_Q.dtype))
        return grad_QD * gates_Q.unsqueeze(1).to(y_QD.dtype), grad_gates_Q


class AllToAll(Dispatcher):
    """Uneven all-to-all over the ranks that share the experts."""

    local = False

    def __init__(self, group: Group) -> None:
        self.group = group

    @torch.compiler.disable
    def dispatch(self, x_TD: Tensor, topk_ids_TK: Tensor, gates_TK: Tensor, experts: int) -> Routed:
        plan = plan_dispatch(topk_ids_TK, experts)
        route, offsets_J = self.route(plan.offsets_E)
        gates_R = gates_TK.new_zeros(gates_TK.numel()).scatter(0, plan.rows_TK.flatten(), gates_TK.flatten())
        x_QD, gates_Q = self.send(gather_tokens(x_TD, plan), route), self.send(gates_R, route)
        return Routed(x_QD, offsets_J, gates_Q, plan, route)

    def route(self, offsets_E: Tensor) -> tuple[Route, Tensor]:
        """The route, and for each expert of this rank the end of its received rows.

        offsets_E: end of each expert's rows among those of this rank's tokens."""
        ranks = self.group.size()
        counts_PJ = offsets_E.diff(prepend=offsets_E.new_zeros(1)).to(torch.int64).reshape(ranks, -1)
        arriving_PJ = torch.empty_like(counts_PJ)
        dist.all_to_all_single(arriving_PJ, counts_PJ, group=self.group)
        send, receive = torch.stack([counts_PJ.sum(1), arriving_PJ.sum(1)]).tolist()
        here = arriving_PJ.shape[1]
        expert_Q = torch.arange(here, device=offsets_E.device).repeat(ranks).repeat_interleave(arriving_PJ.flatten())
        order_Q = expert_Q.argsort(stable=True)
        inverse_Q = torch.empty_like(order_Q).scatter_(0, order_Q, torch.arange(len(order_Q), device=order_Q.device))
        return Route(send, receive, order_Q, inverse_Q), arriving_PJ.sum(0).cumsum(0).to(torch.int32)

    def send(self, x_R: Tensor, route: Route) -> Tensor:
        """Rows in home order to their experts, sorted by expert there."""
        arrived = exchange(x_R, route.send, route.receive, self.group)
        result: Tensor = _Permute.apply(arrived, route.order_Q, route.inverse_Q)
        return result

    @torch.compiler.disable
    def combine(self, y_RD: Tensor, routed: Routed) -> Tensor:
        return sum_rows(self.home(_ApplyGates.apply(y_RD, routed.gates), routed), routed.plan)

    @torch.compiler.disable
    def home(self, x_RX: Tensor, routed: Routed) -> Tensor:
        route = routed.route
        return exchange(_Permute.apply(x_RX, route.inverse_Q, route.order_Q), route.receive, route.send, self.group)

    @torch.compiler.disable
    def home_subset(self, x_RX: Tensor, rows_NK: Tensor, routed: Routed) -> tuple[Tensor, Tensor]:
        route = routed.route
        wanted_R = torch.zeros(routed.plan.tokens_R.shape[0], dtype=torch.bool, device=x_RX.device)
        wanted_R[rows_NK.flatten()] = True
        asked_Q = exchange(wanted_R.to(torch.uint8), route.send, route.receive, self.group).bool()
        to_send = [part.sum() for part in asked_Q.split(route.receive)]
        counts = torch.stack(to_send + [part.sum() for part in wanted_R.split(route.send)]).tolist()
        send, receive = counts[: len(to_send)], counts[len(to_send) :]
        chosen = route.inverse_Q[
            asked_Q
        ]  # of each wanted row, in order of arrival: its index among the rows sorted by expert
        x_home = exchange(x_RX.index_select(0, chosen), send, receive, self.group)
        return x_home, (wanted_R.cumsum(0) - 1)[rows_NK]

    @torch.compiler.disable
    def to_experts(self, keys_T: Tensor, routed: Routed) -> Tensor:
        keys_R = keys_T.index_select(0, routed.plan.tokens_R)
        return self.send(keys_R.to(torch.int32), routed.route).to(torch.int64) & 0xFFFFFFFF

    def gather_experts(self, x_PE: Tensor) -> Tensor:
        return gather_columns(x_PE, self.group)
