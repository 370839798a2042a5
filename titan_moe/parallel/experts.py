"""Expert parallelism: experts are sharded over the ranks of `ep`; tokens are sent to their ranks and outputs back.

T tokens of this rank, K experts per token, R = T * K rows; J experts of this rank, Q rows that they receive; P ranks.

Rows are sent sorted by expert, hence by rank, and arrive sorted by (source rank, expert); one permutation sorts them by expert.
Gate weights travel with the rows and are applied at the experts, so that combining only sums. What a term needs of the
activations is sent back like the outputs: all rows, or only those of the tokens that it samples.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titan_moe.model.moe import Dispatch, Dispatcher, Routed, gather_tokens, plan_dispatch, sum_rows
from torchtitan_ext.collectives import Group, exchange, gather_columns
from torchtitan_ext.ops import select
from torchtitan_ext.ops.routing import gates_by_row


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
    subset: "Subset | None" = None
    """Of the rows that will be asked for, if that was known at the dispatch."""


class Subset(NamedTuple):
    """How many rows go home to each rank when only some are wanted, and which."""

    send: list[int]
    """Wanted rows that this rank's experts have of each rank."""
    receive: list[int]
    """Rows that this rank wants from each rank."""
    wanted_R: Tensor
    """(R,) bool, of this rank's own rows."""


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
        if select.fused(y_QD):  # in one pass: combining with one row per token
            rows_Q1 = torch.arange(len(y_QD), device=y_QD.device).unsqueeze(1)
            kernel = torch.ops.torchtitan_ext.combine_backward
            grad_y_QD, grad_gates_Q1 = kernel(grad_QD, y_QD, rows_Q1, gates_Q.unsqueeze(1))
            return grad_y_QD, grad_gates_Q1.squeeze(1)
        grad_gates_Q = torch.linalg.vecdot(grad_QD.to(gates_Q.dtype), y_QD.to(gates_Q.dtype))
        return grad_QD * gates_Q.unsqueeze(1).to(y_QD.dtype), grad_gates_Q


def per_expert(ends_E: Tensor) -> Tensor:
    """Rows of each expert, int64, from the end of each expert's rows."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)).to(torch.int64)


class AllToAll(Dispatcher):
    """Uneven all-to-all over the ranks that share the experts."""

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
        sampled_N: Tensor | None = None,
    ) -> Routed:
        plan = plan_dispatch(topk_ids_TK, experts)
        wanted_R = None if sampled_N is None else self.wanted(plan.rows_TK.index_select(0, sampled_N), plan)
        route, offsets_J = self.route(plan.offsets_E, wanted_R)
        x_QD = self.send(gather_tokens(x_TD, plan), route)
        gates_Q = self.send(gates_by_row(gates_TK, plan.rows_TK), route)
        return Routed(x_QD, offsets_J, gates_Q, plan, route)

    def route(self, offsets_E: Tensor, wanted_R: Tensor | None) -> tuple[Route, Tensor]:
        """The route, and for each expert of this rank the end of its received rows. Here, and nowhere else in the layer, the
        host waits for the device: the sizes of an all-to-all are numbers on the host.

        offsets_E: end of each expert's rows among those of this rank's tokens. wanted_R: (R,) bool, rows that will be asked
        for."""
        ranks = self.group.size()
        counts_PJ = per_expert(offsets_E).reshape(ranks, -1)
        here, counts = counts_PJ.shape[1], [counts_PJ]
        if wanted_R is not None:
            ends_E = F.pad(wanted_R.cumsum(0), (1, 0)).index_select(0, offsets_E)
            counts.append(per_expert(ends_E).reshape(ranks, -1))
        leaving = torch.cat(counts, 1)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        sums = [part.sum(1) for both in (leaving, arriving) for part in both.split(here, 1)]
        sizes = torch.stack(sums).tolist()
        subset = None if wanted_R is None else Subset(sizes[3], sizes[1], wanted_R)
        send, receive = sizes[0], sizes[len(counts)]
        arriving_PJ = arriving[:, :here]
        expert_Q = torch.arange(here, device=offsets_E.device).repeat(ranks)
        expert_Q = expert_Q.repeat_interleave(arriving_PJ.flatten(), output_size=sum(receive))
        order_Q = expert_Q.argsort(stable=True)
        inverse_Q = torch.empty_like(order_Q).scatter_(0, order_Q, torch.arange(len(order_Q), device=order_Q.device))
        return Route(send, receive, order_Q, inverse_Q, subset), arriving_PJ.sum(0).cumsum(0).to(torch.int32)

    def wanted(self, rows_NK: Tensor, plan: Dispatch) -> Tensor:
        """(R,) bool: whether a row of this rank's tokens is among `rows_NK`."""
        wanted_R = torch.zeros(plan.tokens_R.shape[0], dtype=torch.bool, device=rows_NK.device)
        return wanted_R.index_fill(0, rows_NK.flatten(), True)

    def send(self, x_R: Tensor, route: Route) -> Tensor:
        """Rows in home order to their experts, sorted by expert there."""
        arrived = exchange(x_R, route.send, route.receive, self.group)
        result: Tensor = _Permute.apply(arrived, route.order_Q, route.inverse_Q)
        return result

    @torch.compiler.disable
    def combine(self, y_RD: Tensor, routed: Routed) -> Tensor:
        gated_QD = y_RD if routed.gates is None else _ApplyGates.apply(y_RD, routed.gates)
        return sum_rows(self.home(gated_QD, routed), routed.plan)

    @torch.compiler.disable
    def home(self, x_RX: Tensor, routed: Routed) -> Tensor:
        route = routed.route
        return exchange(_Permute.apply(x_RX, route.inverse_Q, route.order_Q), route.receive, route.send, self.group)

    @torch.compiler.disable
    def home_subset(self, x_RX: Tensor, rows_NK: Tensor, routed: Routed) -> tuple[Tensor, Tensor]:
        route: Route = routed.route
        wanted_R = self.wanted(rows_NK, routed.plan) if route.subset is None else route.subset.wanted_R
        asked_Q = exchange(wanted_R.to(torch.uint8), route.send, route.receive, self.group).bool()
        subset = route.subset or self.subset(asked_Q, wanted_R, route)
        # Of each wanted row, in order of arrival: its index among the rows sorted by expert.
        positions = torch.nonzero_static(asked_Q, size=sum(subset.send)).squeeze(1)
        chosen = route.inverse_Q.index_select(0, positions)
        x_home = exchange(x_RX.index_select(0, chosen), subset.send, subset.receive, self.group)
        return x_home, (wanted_R.cumsum(0) - 1)[rows_NK]

    def subset(self, asked_Q: Tensor, wanted_R: Tensor, route: Route) -> Subset:
        """Counts the rows when the dispatch did not know of them; the host waits for the device."""
        asked = [part.sum() for part in asked_Q.split(route.receive)]
        counts = torch.stack(asked + [part.sum() for part in wanted_R.split(route.send)]).tolist()
        return Subset(counts[: len(asked)], counts[len(asked) :], wanted_R)

    @torch.compiler.disable
    def to_experts(self, keys_T: Tensor, routed: Routed) -> Tensor:
        keys_R = keys_T.index_select(0, routed.plan.tokens_R)
        return self.send(keys_R.to(torch.int32), routed.route).to(torch.int64) & 0xFFFFFFFF

    def gather_experts(self, x_PE: Tensor) -> Tensor:
        return gather_columns(x_PE, self.group)
