"""Adding a loss to Megatron's objective: weights of tokens, scale of the gradient, values for the log.

Megatron's gradient is a sum over ranks, micro-batches and tokens, divided in one of two ways (`calculate_per_token_loss`):

- False: each micro-batch is divided by its number of tokens, then micro-batches and data-parallel ranks are averaged.
- True: `finalize_model_grads` divides by the number of labelled tokens of the global batch.

The scale of `MoEAuxLossAutoScaler` holds what Megatron's schedule multiplies the main loss by (micro-batches, context
parallelism, fp16). So what is attached here is a sum over this rank's tokens, divided by the tokens of the micro-batch in the
first case only. Ranks of tensor and context parallelism hold different tokens of a micro-batch; their gradients are summed.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from torchtitan_ext.adapters.megatron.tracking import record
from torchtitan_ext.collectives import Group, all_sum


class TokenWeights(NamedTuple):
    """How much each token of this rank counts, in Megatron's order of tokens."""

    weights_T: Tensor
    """1 / (tokens of the micro-batch that count, on all ranks of tensor and context parallelism); 0 where padded."""
    total: Tensor | float
    """Tokens of the micro-batch that count."""


def token_weights(router: Any, tokens: int, padding_mask: Tensor | None, device: torch.device) -> TokenWeights:
    """The weights of this rank's tokens.

    padding_mask: (S, B), True where a token does not count; None: all count. Raises ValueError if it has another size."""
    group = router.tp_cp_group
    if padding_mask is None:
        total = float(tokens * group.size())
        return TokenWeights(torch.full((tokens,), 1.0 / max(total, 1.0), device=device), total)
    if padding_mask.numel() != tokens:
        raise ValueError(
            f"padding_mask has {padding_mask.numel()} entries for the {tokens} tokens of this rank. Megatron splits it for "
            "sequence parallelism on the first pipeline stage only: pass later stages their own part"
        )
    kept_T = (~padding_mask.reshape(-1)).to(torch.float32)
    counted = all_sum(kept_T.sum(), group_or_none(group)).clamp(min=1.0)
    return TokenWeights(kept_T / counted, counted)


def group_or_none(group: Group) -> Group | None:
    """The group, or None where it has one rank and there is nothing to sum."""
    return group if group.size() > 1 else None


def acts(module: torch.nn.Module) -> bool:
    """Whether losses are computed in this forward pass: not in evaluation, and not in the first pass of a recomputed block,
    which runs without gradients."""
    return module.training and torch.is_grad_enabled()


def scaled(loss: Tensor, weights: TokenWeights, config: Any) -> Tensor:
    """A weighted sum over tokens in the scale that Megatron expects of it."""
    return loss * weights.total if config.calculate_per_token_loss else loss


def attach(activation: Tensor, loss: Tensor, weights: TokenWeights, config: Any) -> Tensor:
    """The activation, unchanged; the backward pass through it also computes the gradient of the loss.

    loss: a weighted sum over tokens, times its coefficient."""
    attached: Tensor = MoEAuxLossAutoScaler.apply(activation, scaled(loss, weights, config))
    return attached


def log_value(term: str, value: Tensor, router: Any) -> None:
    """Adds a term's value in one layer to Megatron's log, without its coefficient.

    value: this rank's part. Parts are summed over tensor and context parallelism and averaged over data parallelism."""
    ranks = router.tp_cp_group.size()
    record(f"{term}_loss", value.detach() * ranks, router.layer_number, router.config.num_layers, router.tp_dp_cp_group)
