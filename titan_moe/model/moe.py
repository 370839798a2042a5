"""The Mixture-of-Experts layer: route, dispatch, compute, combine.

T tokens, D model width, E experts, K chosen experts (k), R = T * k routed rows, F expert hidden width.

Dispatch and combine are siblings of the expert computation: expert parallelism replaces them and leaves the maths alone.
Rows are sorted by expert, gathered once and summed back once. No (T, E, F) tensor, no one-hot matrix.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.config.tables import MoE
from titan_moe.model.feed_forward import FeedForward, swiglu
from titan_moe.model.gemm import grouped_linear
from torchtitan_ext.carry import Carry
from torchtitan_ext.gram import accumulation_dtype, gram_through
from torchtitan_ext.losses import normalize_scores
from torchtitan_ext.response import response_through
from torchtitan_ext.terms import LayerView, Terms, Tokens, WeightedGram


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

    def forward(self, x_TD: Tensor) -> Choice:
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
        return Choice(logits_TE, scores_TE, topk_ids_TK, gates_TK)


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


class Experts(nn.Module):
    """E SwiGLU networks, in the layout that the grouped product wants: gate and up fused (E, 2F, D), down (E, D, F)."""

    def __init__(self, dim: int, moe: MoE) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(moe.experts, 2 * moe.hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(moe.experts, dim, moe.hidden_dim))

    def activations(self, x_RD: Tensor, gate_up_EGD: Tensor, offsets_E: Tensor) -> Tensor:
        """SwiGLU activations z of rows sorted by expert: (R, D) -> (R, F)."""
        return swiglu(grouped_linear(x_RD, gate_up_EGD, offsets_E))

    def outputs(self, z_RF: Tensor, offsets_E: Tensor) -> Tensor:
        """(R, F) -> (R, D)."""
        return grouped_linear(z_RF, self.down, offsets_E)


class MoELayer(nn.Module):
    """Routed experts, shared experts, and this layer's share of the regularizers."""

    def __init__(self, dim: int, moe: MoE, terms: Terms, layer: int) -> None:
        """layer: index among the MoE layers, from 0."""
        super().__init__()
        self.layer = layer
        self.terms = terms
        self.router = Router(dim, moe)
        self.experts = Experts(dim, moe)
        self.shared = FeedForward(dim, moe.hidden_dim * moe.shared_experts) if moe.shared_experts else None

    def forward(self, x_TD: Tensor, carry: Carry, tokens: Tokens) -> tuple[Tensor, Carry, Tensor]:
        """Output (T, D), the carry with this layer added, and the chosen experts (T, k)."""
        choice = self.router(x_TD)
        dispatch = plan_dispatch(choice.topk_ids_TK, self.router.moe.experts)
        x_RD = _Gather.apply(x_TD, dispatch.tokens_R, dispatch.rows_TK)
        gate_up: Tensor = self.experts.gate_up
        response = None
        proxies = self.terms.proxies(self.router.weight, self.layer, tokens)
        if proxies is not None:
            gate_up, response = response_through(gate_up, proxies, self.router.moe.hidden_dim)
        z_RF = self.experts.activations(x_RD, gate_up, dispatch.offsets_E)
        gram = None
        chosen = self.terms.gram_rows(dispatch.rows_TK, self.layer, tokens)
        if chosen is not None:
            z_RF, gram_NKK = gram_through(z_RF, chosen.rows_NK)
            gram = WeightedGram(gram_NKK, chosen.weights_N)
        y_RD = self.experts.outputs(z_RF, dispatch.offsets_E)
        out_TD: Tensor = _Combine.apply(y_RD, choice.gates_TK, dispatch.tokens_R, dispatch.rows_TK)
        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        view = LayerView(
            **choice._asdict(),
            z_RF=z_RF,
            y_RD=y_RD,
            rows_TK=dispatch.rows_TK,
            gram=gram,
            response_EE=response,
        )
        return out_TD, self.terms.add(view, carry, self.layer, tokens), choice.topk_ids_TK
