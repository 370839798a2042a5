"""The router's epilogue by kernels, where `select.fused(logits)`: everything between the router's product and dispatch.

T tokens, E experts, K experts per token (k). `Router.forward` of the model and the terms have the same in PyTorch's
operations, which define it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RouterSums(NamedTuple):
    """What terms and measures need of a router's scores, beside the scores themselves. Scores sum to 1 over experts."""

    lse_T: Tensor
    """Log-sum-exp of the logits."""
    entropy_T: Tensor
    """Entropy of the scores in nats, without a gradient."""
    largest_mass_T: Tensor
    """Sum of the k largest scores, without the balancing bias."""
    chosen_mass_T: Tensor
    """Sum of the chosen experts' scores, without a gradient."""
    counts_E: Tensor
    """Assignments of labelled tokens (weight above 0) to experts; int64."""
    shares_E: Tensor
    """Sums over tokens of the scores times the tokens' weights."""

    def detach(self) -> "RouterSums":
        return RouterSums(*(x.detach() for x in self))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, ids_TK: Tensor, weights_T: Tensor, *options: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.torchtitan_ext.route(logits_TE, ids_TK, weights_T, *options)
        ctx.save_for_backward(logits_TE, ids_TK, weights_T)
        ctx.options = options
        _, _, _, entropy_T, _, chosen_mass_T, counts_E, _ = out
        ctx.mark_non_differentiable(entropy_T, chosen_mass_T, counts_E)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_scores, d_gates, d_lse, _, d_largest_mass, _, _, d_shares = gradients
        given = (d_scores, d_gates, d_lse, d_largest_mass, d_shares)
        d_logits: Tensor = torch.ops.torchtitan_ext.route_backward(*ctx.saved_tensors, *given, *ctx.options)
        return d_logits, None, None, None, None, None


def choose_experts(logits_TE: Tensor, bias_E: Tensor, top_k: int, score: str) -> Tensor:
    """The experts with the largest scores plus bias, (T, k) int64, largest first; the lower index where they are equal."""
    ids_TK: Tensor = torch.ops.torchtitan_ext.choose_experts(logits_TE.detach(), bias_E, top_k, score == "sigmoid")
    return ids_TK


def route(
    logits_TE: Tensor, ids_TK: Tensor, weights_T: Tensor, score: str, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, RouterSums]:
    """Scores (T, E) that sum to 1, gate weights (T, k) of the chosen experts, and the sums. First derivatives only.

    logits: float32. weights: (T,) float32. score: "softmax" or "sigmoid". normalize: gate weights of a token sum to `scale`;
    else they are the scores, before they are made to sum to 1, times `scale`."""
    scores_TE, gates_TK, *sums = _Route.apply(logits_TE, ids_TK, weights_T, score == "sigmoid", normalize, scale)
    return scores_TE, gates_TK, RouterSums(*sums)
