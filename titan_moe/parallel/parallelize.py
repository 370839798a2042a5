"""The one function between the plain network and the training loop."""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_moe.config.tables import ActivationCheckpoint, Config
from titan_moe.model.transformer import Transformer

# Saved in every mode: a flipped tie would send rows elsewhere in the backward pass than in the forward pass.
CHOICES = {torch.ops.aten.topk.default}
# Saved in mode "selective": what is dear to compute.
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.titan_moe.grouped_linear.default,
}


def parallelize(model: Transformer, config: Config) -> None:
    """Applies recomputation, then compilation, block by block, in place; parameter names stay as they are."""
    for block in model.layers.values():
        recompute(block, config.activation_checkpoint)
        if config.compile.enable:
            block.compile()


def recompute(block: torch.nn.Module, settings: ActivationCheckpoint) -> None:
    """Wraps the block's forward in a non-reentrant checkpoint (the reentrant form loses the carry's gradients)."""
    if settings.mode == "none":
        return
    saved = CHOICES | PRODUCTS if settings.mode == "selective" else CHOICES

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001 - torch's signature
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    block.forward = functools.partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
