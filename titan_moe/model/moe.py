"""The Mixture-of-Experts layer: route, dispatch, compute, combine.

T tokens, D model width, E experts, K chosen experts (k), R = T * k routed rows, F expert hidden width.

Dispatch and combine are siblings of the expert computation: expert parallelism replaces them and leaves the maths alone.
Rows are sorted by expert, gathered once and summed back once. No (T, E, F) tensor, no one-hot matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.config.tables import MoE
from titan_moe.model.feed_forward import FeedForward, swiglu
from titan_moe.model.gemm import grouped_linear, local
from titan_moe.model.shares import ALONE, Shares
from torchtitan_ext.carry import Carry
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.losses import normalize_scores
from torchtitan_ext.ops.gram import gram_through
from torchtitan_ext.ops.response import lengths, response_through
from torchtitan_ext.terms import GramRows, LayerView, Sketches, Terms, Tokens, WeightedGram


class Choice(NamedTuple):
    """What the router decided."""

    logits_TE: Tensor
    scores_TE: Tensor  # normalised to sum to 1
    topk_ids_TK: Tensor
    gates_TK: Tensor


def no_proxies(weight_ED: Tensor) -> None:
    """For a router that nothing is asked of but its choice."""


class Router(nn.Module):
    """Chooses each token's experts, in at least float32."""

    expert_bias: Tensor

    def __init__(self, dim: int, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.experts, dim))
        self.register_buffer("expert_bias", torch.zeros(moe.experts, dtype=torch.float32))

    def forward(
        self, x_TD: Tensor, proxies_of: Callable[[Tensor], Tensor | None] = no_proxies
    ) -> tuple[Choice, Tensor | None]:
        """The choice, and what `proxies_of` makes of the routing vectors (erc's noisy ones, if it is on)."""
        dtype = accumulation_dtype(x_TD.dtype)
        logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        if self.moe.score == "softmax":
            raw_TE = scores_TE = logits_TE.softmax(-1)
        else:
            raw_TE = logits_TE.sigmoid()
            scores_TE = normalize_scores(raw_TE)
        topk_ids_TK = (raw_TE.detach() + self.expert_bias).topk(self.moe.top_k, dim=-1).indices
        gates_TK = raw_TE.gather(1, topk_ids_TK)
        if self.moe.normalize_topk:
            gates_TK = normalize_scores(gates_TK)
        if self.moe.route_scale != 1.0:
            gates_TK = gates_TK * self.moe.route_scale
        return Choice(logits_TE, scores_TE, topk_ids_TK, gates_TK), proxies_of(self.weight)


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
        return F.embedding_bag(rows_TK, grad_RD.contiguous(), mode="sum"), None, None


def gather_tokens(x_TD: Tensor, home: Dispatch) -> Tensor:
    """Each row's token, in the order of the experts: (T, D) -> (R, D)."""
    x_RD: Tensor = _Gather.apply(x_TD, home.tokens_R, home.rows_TK)
    return x_RD


class _Combine(torch.autograd.Function):
    """Expert order back to tokens, each row times its gate weight."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gates_TK: Tensor, tokens_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, gates_TK, tokens_R, rows_TK)
        return F.embedding_bag(rows_TK, y_RD, mode="sum", per_sample_weights=gates_TK.to(y_RD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, gates_TK, tokens_R, rows_TK = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, tokens_R)
        grad_gates_R = torch.linalg.vecdot(grad_RD.to(gates_TK.dtype), y_RD.to(gates_TK.dtype))
        gates_R = torch.empty_like(grad_gates_R).scatter_(0, rows_TK.flatten(), gates_TK.flatten())
        return grad_RD * gates_R.unsqueeze(1).to(y_RD.dtype), grad_gates_R[rows_TK], None, None


class Routed(NamedTuple):
    """Rows at the experts, and the way home."""

    x_RD: Tensor
    """Rows of the experts on this rank, sorted by expert."""
    offsets_E: Tensor
    """End of each of those experts' rows, int32."""
    home: Dispatch
    """Of this rank's own tokens: where their rows stand, sorted by expert over all experts."""
    route: Any = None
    """What a dispatcher between ranks must remember."""


class Dispatcher:
    """Brings tokens to experts and back. This one has all experts on its own rank; others replace it (parallel/experts.py)."""

    def dispatch(self, x_TD: Tensor, topk_ids_TK: Tensor, experts: int) -> Routed:
        home = plan_dispatch(topk_ids_TK, experts)
        return Routed(gather_tokens(x_TD, home), home.offsets_E, home)

    def gram(self, z_RF: Tensor, chosen: GramRows, routed: Routed) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - the interface
        """z to go on with, and the Gram matrices (N, k, k) of the chosen tokens."""
        return gram_through(z_RF, chosen.rows_NK)

    def sketches(
        self, z_RF: Tensor, keys_T: Tensor, routed: Routed, make: Callable[[Tensor, Tensor], Sketches]
    ) -> Sketches:
        """`make(z, key of each row's token)` at the experts, in home order."""
        return make(z_RF, keys_T.index_select(0, routed.home.tokens_R))

    def activations(self, z_RF: Tensor, routed: Routed) -> Tensor:  # noqa: ARG002 - the interface
        """z of this rank's own tokens, in home order."""
        return z_RF

    def outputs(self, y_RD: Tensor, routed: Routed) -> Tensor:  # noqa: ARG002 - the interface
        """The experts' outputs for this rank's own tokens, in home order."""
        return y_RD

    def combine(self, y_RD: Tensor, gates_TK: Tensor, routed: Routed) -> Tensor:
        """Outputs in home order, each times its gate weight, summed per token: (R, D) -> (T, D)."""
        out_TD: Tensor = _Combine.apply(y_RD, gates_TK, routed.home.tokens_R, routed.home.rows_TK)
        return out_TD

    def response(self, response_EJ: Tensor) -> Tensor:
        """erc's matrix over all experts, from the columns of those on this rank."""
        return response_EJ


class Experts(nn.Module):
    """E SwiGLU networks, in the layout that the grouped product wants: gate and up (E, 2, F, D), down (E, D, F).

    Under expert and tensor parallelism the weights are DTensors sharded over E and F, and this rank computes its own part.
    """

    def __init__(self, dim: int, moe: MoE) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(moe.experts, 2, moe.hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(moe.experts, dim, moe.hidden_dim))

    def forward(
        self,
        x_RD: Tensor,
        offsets_E: Tensor,
        proxies_ED: Tensor | None,
        on_activations: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Outputs (R, D), activations z (R, F), Gram matrices that `on_activations` took between the two products, and
        the squared lengths of these experts' answers to the proxies (E, J)."""
        gate_up, down = local(self.gate_up), local(self.down)
        hidden_dim = gate_up.shape[2]
        gate_up, response = gate_up.flatten(1, 2), None
        if proxies_ED is not None:
            gate_up, response = response_through(gate_up, proxies_ED, hidden_dim)
        z_RF, gram = on_activations(swiglu(grouped_linear(x_RD, gate_up, offsets_E)))
        return grouped_linear(z_RF, down, offsets_E), z_RF, gram, response


class MoELayer(nn.Module):
    """Routed experts, shared experts, and this layer's share of the regularizers."""

    def __init__(self, dim: int, moe: MoE, terms: Terms, layer: int) -> None:
        """layer: index among the MoE layers, from 0."""
        super().__init__()
        self.layer = layer
        self.terms = terms
        self.shares: Shares = ALONE
        self.dispatcher = Dispatcher()
        self.router = Router(dim, moe)
        self.experts = Experts(dim, moe)
        self.shared = FeedForward(dim, moe.hidden_dim * moe.shared_experts) if moe.shared_experts else None

    def forward(self, x_TD: Tensor, carry: Carry, tokens: Tokens) -> tuple[Tensor, Carry, Tensor]:
        """Output (T, D), this rank's share of it under tensor parallelism, the carry with this layer added, and the chosen
        experts (T, k)."""
        choice, proxies = self.router(
            self.shares.alike(x_TD), lambda weight: self.terms.proxies(weight, self.layer, tokens)
        )
        routed = self.dispatcher.dispatch(x_TD, choice.topk_ids_TK, self.router.moe.experts)
        chosen = self.terms.gram_rows(routed.home.rows_TK, self.layer, tokens)

        def take_gram(z_RF: Tensor) -> tuple[Tensor, Tensor | None]:
            return (z_RF, None) if chosen is None else self.dispatcher.gram(z_RF, chosen, routed)

        if proxies is not None:
            proxies = self.shares.enter(proxies)
        y_RD, z_RF, gram, response = self.experts(routed.x_RD, routed.offsets_E, proxies, take_gram)
        y_RD = self.dispatcher.outputs(y_RD, routed)
        sketches = self.sketches(z_RF, routed, tokens)
        out_TD = self.dispatcher.combine(y_RD, self.shares.enter(choice.gates_TK), routed)
        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        view = LayerView(
            **choice._asdict(),
            z_RF=self.home_activations(z_RF, routed) if self.terms.needs_activations else None,
            y_RD=self.shares.leave(y_RD) if self.terms.needs_outputs else None,
            rows_TK=routed.home.rows_TK,
            gram=None if gram is None or chosen is None else WeightedGram(self.shares.leave(gram), chosen.weights_N),
            sketches=sketches,
            response_EE=None if response is None else self.dispatcher.response(lengths(self.shares.leave(response))),
        )
        return out_TD, self.terms.add(view, carry, self.layer, tokens), choice.topk_ids_TK

    def sketches(self, z_RF: Tensor, routed: Routed, tokens: Tokens) -> Sketches | None:
        keys_T = self.terms.sketch_keys(self.layer, tokens)
        if keys_T is None:
            return None
        first = self.shares.first_row(z_RF.shape[1])

        def make(z_RF: Tensor, keys_R: Tensor) -> Sketches:
            return self.terms.sketch(z_RF, keys_R, self.layer, tokens, first)

        found = self.dispatcher.sketches(z_RF, keys_T, routed, make)
        return Sketches(self.shares.leave(found.sketched_RM), self.shares.leave(found.norms_R))

    def home_activations(self, z_RF: Tensor, routed: Routed) -> Tensor:
        """z of this rank's own tokens, all hidden units."""
        return self.shares.widen(self.dispatcher.activations(z_RF, routed))
