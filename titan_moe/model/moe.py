"""The Mixture-of-Experts layer: route, dispatch, compute, combine.

T tokens, D model width, E experts, K chosen experts (k), R = T * k routed rows, F expert hidden width.

Dispatch and combine are separate from the expert computation; expert parallelism replaces only those two. "Home order":
the rows of this rank's own tokens, sorted by expert over all experts. Rows are gathered once and summed back once. No
(T, E, F) tensor, no one-hot matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.config.tables import MoE
from titan_moe.model.comm import SINGLE_RANK, TPComm
from titan_moe.model.feed_forward import FeedForward, SharedGate
from titan_moe.model.gemm import grouped_linear, local
from titan_moe.model.router_product import router_product, splits
from torchtitan_ext.carry import Carry
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops import select
from torchtitan_ext.ops.response import response_through, safe_sqrt
from torchtitan_ext.ops.router import RouterSums, choose_experts, route
from torchtitan_ext.ops.routing import gates_by_row, labelled_counts, normalize_scores
from torchtitan_ext.terms import LayerView, Terms, Tokens


class Choice(NamedTuple):
    """What the router decided."""

    logits_TE: Tensor
    scores_TE: Tensor  # normalised to sum to 1
    topk_ids_TK: Tensor
    gates_TK: Tensor


class Router(nn.Module):
    """Chooses each token's experts, in at least float32."""

    expert_bias: Tensor

    def __init__(self, dim: int, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.experts, dim))
        self.register_buffer("expert_bias", torch.zeros(moe.experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor, weights_T: Tensor | None = None) -> tuple[Choice, RouterSums | None]:
        """The choice, and sums over experts and tokens that terms and measures use, where one kernel computes both.

        x: (T, D). weights: of the tokens (T,); without them there are no sums.
        """
        dtype = accumulation_dtype(x_TD.dtype)
        if splits(x_TD) and self.weight.dtype == torch.float32:
            logits_TE = router_product(x_TD, self.weight)
        else:
            logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        if weights_T is not None and select.fused(logits_TE):
            moe = self.moe
            topk_ids_TK = choose_experts(logits_TE, self.expert_bias, moe.top_k, moe.score)
            options = (moe.score, moe.normalize_topk, moe.route_scale)
            scores_TE, gates_TK, sums = route(logits_TE, topk_ids_TK, weights_T, *options)
            return Choice(logits_TE, scores_TE, topk_ids_TK, gates_TK), sums
        if self.moe.score == "softmax":
            log_scores_TE = logits_TE  # up to a constant per token
            raw_TE = scores_TE = logits_TE.softmax(-1)
        else:
            log_scores_TE = F.logsigmoid(logits_TE)
            raw_TE = logits_TE.sigmoid()
            scores_TE = normalize_scores(raw_TE, log_scores_TE)
        topk_ids_TK = (raw_TE.detach() + self.expert_bias).topk(self.moe.top_k, dim=-1).indices
        gates_TK = raw_TE.gather(1, topk_ids_TK)
        if self.moe.normalize_topk:
            gates_TK = normalize_scores(gates_TK, log_scores_TE.gather(1, topk_ids_TK))
        if self.moe.route_scale != 1.0:
            gates_TK = gates_TK * self.moe.route_scale
        return Choice(logits_TE, scores_TE, topk_ids_TK, gates_TK), None


class Dispatch(NamedTuple):
    """Where every routed row comes from and goes to."""

    tokens_R: Tensor
    """Token of each row, rows sorted by expert."""
    rows_TK: Tensor
    """Row of token i's a-th expert."""
    offsets_E: Tensor
    """End of each expert's rows, int32."""


def plan_dispatch(topk_ids_TK: Tensor, experts: int) -> Dispatch:
    """Sorts the (token, choice) pairs by expert, stably."""
    tokens, k = topk_ids_TK.shape
    sorted_ids, order_R = topk_ids_TK.flatten().sort(stable=True)
    rows = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(tokens * k, device=order_R.device))
    counts_E = torch.zeros(experts, dtype=torch.int32, device=order_R.device)
    counts_E = counts_E.scatter_add(0, sorted_ids, torch.ones_like(sorted_ids, dtype=torch.int32))
    offsets_E = counts_E.cumsum(0, dtype=torch.int32)
    return Dispatch(order_R // k, rows.reshape(tokens, k), offsets_E)


class _Gather(torch.autograd.Function):
    """Tokens to expert order. The backward sums each token's k rows in one pass, with no (T, k, D) tensor."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TK)
        return x_TD.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (rows_TK,) = ctx.saved_tensors
        return _sum_rows(grad_RD.contiguous(), rows_TK), None, None


def _sum_rows(y_RD: Tensor, rows_TK: Tensor) -> Tensor:
    if select.fused(y_RD):
        summed_TD: Tensor = torch.ops.torchtitan_ext.combine(y_RD, rows_TK, None)
        return summed_TD
    return F.embedding_bag(rows_TK, y_RD, mode="sum")


def gather_tokens(x_TD: Tensor, plan: Dispatch) -> Tensor:
    """Each row's token, in the order of the experts: (T, D) -> (R, D)."""
    x_RD: Tensor = _Gather.apply(x_TD, plan.tokens_R, plan.rows_TK)
    return x_RD


class _SumRows(torch.autograd.Function):
    """Home order back to tokens: the sum of each token's k rows. `_Gather` and this are each other's backward."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, tokens_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_R)
        return _sum_rows(y_RD, rows_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        (tokens_R,) = ctx.saved_tensors
        return grad_TD.index_select(0, tokens_R), None, None


def sum_rows(y_RD: Tensor, plan: Dispatch) -> Tensor:
    """The sum of each token's rows, in home order: (R, D) -> (T, D)."""
    out_TD: Tensor = _SumRows.apply(y_RD, plan.tokens_R, plan.rows_TK)
    return out_TD


class _Combine(torch.autograd.Function):
    """Expert order back to tokens, each row times its gate weight."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gates_TK: Tensor, tokens_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, gates_TK, tokens_R, rows_TK)
        if select.fused(y_RD):
            out_TD: Tensor = torch.ops.torchtitan_ext.combine(y_RD, rows_TK, gates_TK)
            return out_TD
        return F.embedding_bag(rows_TK, y_RD, mode="sum", per_sample_weights=gates_TK.to(y_RD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, gates_TK, tokens_R, rows_TK = ctx.saved_tensors
        if select.fused(y_RD):
            return *torch.ops.torchtitan_ext.combine_backward(grad_TD, y_RD, rows_TK, gates_TK), None, None
        grad_RD = grad_TD.index_select(0, tokens_R)
        grad_gates_R = torch.linalg.vecdot(grad_RD.to(gates_TK.dtype), y_RD.to(gates_TK.dtype))
        gates_R = gates_by_row(gates_TK, rows_TK)
        return grad_RD * gates_R.unsqueeze(1).to(y_RD.dtype), grad_gates_R[rows_TK], None, None


class Routed(NamedTuple):
    """Rows at the experts of this rank, and what it takes to bring their outputs back."""

    x_RD: Tensor
    """Token of each row, sorted by expert."""
    offsets_E: Tensor
    """End of each expert's rows, int32."""
    gates: Tensor | None
    """Gate weights as `combine` applies them: (T, K), or one per row at the experts; None: they are in the rows already."""
    plan: Dispatch
    """The dispatch of this rank's own tokens; its rows are in home order."""
    route: Any = None
    """What a dispatcher between ranks remembers of the exchange."""


class Dispatcher:
    """Sends tokens to experts and sums their outputs per token. Here all experts are on this rank.

    parallel/experts.py has the one for expert parallelism.
    """

    local = True
    """Whether rows at the experts are in home order."""

    def dispatch(
        self,
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        gates_TK: Tensor,
        experts: int,
        sampled_N: Tensor | None = None,  # noqa: ARG002 - the interface
    ) -> Routed:
        """A row for every token and chosen expert, at that expert. sampled_N: tokens whose rows `home_subset` will be asked
        for, if that is known."""
        plan = plan_dispatch(topk_ids_TK, experts)
        return Routed(gather_tokens(x_TD, plan), plan.offsets_E, gates_TK, plan)

    def combine(self, y_RD: Tensor, routed: Routed) -> Tensor:
        """Expert outputs times their gate weights, summed per token: (R, D) -> (T, D)."""
        if routed.gates is None:
            return sum_rows(y_RD, routed.plan)
        out_TD: Tensor = _Combine.apply(y_RD, routed.gates, routed.plan.tokens_R, routed.plan.rows_TK)
        return out_TD

    def home(self, x_RX: Tensor, routed: Routed) -> Tensor:  # noqa: ARG002 - the interface
        """Rows at the experts to the ranks of their tokens, in home order."""
        return x_RX

    def home_subset(self, x_RX: Tensor, rows_NK: Tensor, routed: Routed) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Rows that include those of `rows_NK` (in home order), and the indices (N, K) of those. Here: all rows."""
        return x_RX, rows_NK

    def to_experts(self, keys_T: Tensor, routed: Routed) -> Tensor:
        """A 32-bit integer per token, at each of its rows at the experts: (T,) -> (R,) int64."""
        return keys_T.index_select(0, routed.plan.tokens_R)

    def gather_experts(self, x_PE: Tensor) -> Tensor:
        """Columns of all experts, from those of this rank's: (P, E here) -> (P, E)."""
        return x_PE


class Experts(nn.Module):
    """E SwiGLU networks. Weights are laid out as the grouped GEMM wants them: gate and up (E, 2, F, D), down (E, D, F).

    Under expert and tensor parallelism they are DTensors sharded over E and F, and this rank computes its shard.
    """

    def __init__(self, dim: int, moe: MoE) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(moe.experts, 2, moe.hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(moe.experts, dim, moe.hidden_dim))
        self.multiply: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_linear
        """What stands in for the plain grouped product (model/float8_experts.py)."""

    def gate_and_up(
        self, x_RD: Tensor, offsets_E: Tensor, probes_PD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Gate and up projections (R, 2F), and squared norms (P, E) of the gate projections of the probes, if given."""
        gate_up_E2FD = local(self.gate_up)
        hidden_dim, squares_PE = gate_up_E2FD.shape[2], None
        gate_up = gate_up_E2FD.flatten(1, 2)
        if probes_PD is not None:
            gate_up, squares_PE = response_through(gate_up, probes_PD, hidden_dim)
        return self.multiply(x_RD, gate_up, offsets_E), squares_PE

    def output(self, z_RF: Tensor, offsets_E: Tensor) -> Tensor:
        """Down projection: (R, F) -> (R, D), before the gate weight."""
        return self.multiply(z_RF, local(self.down), offsets_E)


class RoutedRows(NamedTuple):
    """What terms use to get at rows that may be on other ranks: torchtitan_ext's `ExpertRows`."""

    dispatcher: Dispatcher
    comm: TPComm
    routed: Routed

    @property
    def local(self) -> bool:
        return self.dispatcher.local

    def first_hidden(self, width: int) -> int:
        return self.comm.shard_offset(width)

    def home(self, x_RX: Tensor) -> Tensor:
        return self.dispatcher.home(x_RX, self.routed)

    def home_subset(self, x_RX: Tensor, rows_NK: Tensor) -> tuple[Tensor, Tensor]:
        return self.dispatcher.home_subset(x_RX, rows_NK, self.routed)

    def to_experts(self, keys_T: Tensor) -> Tensor:
        return self.dispatcher.to_experts(keys_T, self.routed)

    def sum_hidden(self, x: Tensor) -> Tensor:
        return self.comm.reduce_from_tp(x)


class MoELayer(nn.Module):
    """Routed experts, shared experts, and this layer's part of the loss terms."""

    def __init__(self, dim: int, moe: MoE, terms: Terms, layer: int) -> None:
        """layer: index among the MoE layers, from 0."""
        super().__init__()
        self.layer = layer
        self.terms = terms
        self.comm: TPComm = SINGLE_RANK
        self.dispatcher = Dispatcher()
        self.router = Router(dim, moe)
        self.experts = Experts(dim, moe)
        self.shared = FeedForward(dim, moe.hidden_dim * moe.shared_experts) if moe.shared_experts else None
        self.shared_gate = SharedGate(dim) if moe.shared_gate else None

    def forward(self, x_TD: Tensor, carry: Carry, tokens: Tokens) -> tuple[Tensor, Carry, Tensor]:
        """Output (T, D), a partial sum under tensor parallelism; the carry with this layer added; the chosen experts (T, k)."""
        comm, terms, experts = self.comm, self.terms, self.experts
        choice, sums = self.router(comm.divide_gradient(x_TD), tokens.weights.flatten())
        probes = terms.probes(self.router.weight, self.layer, tokens)
        samples = terms.samples(self.layer, tokens)
        sampled_N = next(iter(samples.values()))[0] if len(samples) == 1 else None
        routed = self.dispatcher.dispatch(
            x_TD, choice.topk_ids_TK, comm.copy_to_tp(choice.gates_TK), self.router.moe.experts, sampled_N
        )
        rows = RoutedRows(self.dispatcher, comm, routed)
        view = self.view(choice, sums, routed, tokens)._replace(samples=samples)

        gate_up, squares_PE = experts.gate_and_up(
            routed.x_RD, routed.offsets_E, None if probes is None else comm.copy_to_tp(probes.vectors_PD)
        )
        assert routed.gates is not None
        gated = terms.activate_gated(gate_up, routed.gates, view, rows)
        z_RF, observed = terms.activate(gate_up, view, rows) if gated is None else gated
        y_RD = experts.output(z_RF, routed.offsets_E)
        out_TD = self.dispatcher.combine(y_RD, routed if gated is None else routed._replace(gates=None))
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                factor_T1 = comm.copy_to_tp(self.shared_gate(comm.divide_gradient(x_TD)))
                shared_TD = shared_TD * factor_T1.to(shared_TD.dtype)
            out_TD = out_TD + shared_TD

        if terms.needs.activations:
            view = view._replace(z_RF=comm.gather_from_tp(rows.home(z_RF)))
        if terms.needs.outputs:
            view = view._replace(y_RD=comm.reduce_from_tp(rows.home(y_RD)))
        if squares_PE is not None:
            view = view._replace(
                responses_PE=self.dispatcher.gather_experts(safe_sqrt(comm.reduce_from_tp(squares_PE)))
            )
        return out_TD, terms.add(view, observed, probes, carry), choice.topk_ids_TK

    def view(self, choice: Choice, sums: RouterSums | None, routed: Routed, tokens: Tokens) -> LayerView:
        """What terms see of the router's choice."""
        weights_T = tokens.weights.flatten()
        if sums is not None:
            counts_E = sums.counts_E
        else:
            counts_E = labelled_counts(choice.topk_ids_TK, choice.scores_TE.shape[1], weights_T)
        return LayerView(
            self.layer,
            tokens,
            **choice._asdict(),
            sums=sums,
            rows_TK=routed.plan.rows_TK,
            weights_T=weights_T,
            counts_E=counts_E,
        )
