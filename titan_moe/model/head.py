"""Vocabulary projection and cross-entropy, a slice of the tokens at a time, so that all logits never exist at once.

T tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from titan_moe.model.comm import SINGLE_RANK, TPComm
from titan_moe.model.gemm import product_dtype
from torchtitan_ext.dtypes import accumulation_dtype

SLICE_LOGITS = 1 << 24  # logits alive at once: 64 MiB in float32; smaller slices slow the products down


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The forward pass also computes the gradients while it has a slice's logits: three products instead of four."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, comm: TPComm
    ) -> Tensor:
        dtype, exact = product_dtype(hidden_TD), accumulation_dtype(hidden_TD.dtype)
        w_VD = weight_VD.to(hidden_TD.dtype).to(dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_TD = torch.empty_like(hidden_TD) if need_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=exact) if need_weight else None
        total = weights_T.new_zeros((), dtype=exact)
        first, rows = comm.shard_offset(weight_VD.shape[0]), weight_VD.shape[0]
        step = max(1, SLICE_LOGITS // weight_VD.shape[0])
        for start in range(0, hidden_TD.shape[0], step):
            part = slice(start, start + step)
            h_tD = hidden_TD[part].to(dtype)
            weights = weights_T[part].to(exact)
            logits = (h_tD @ w_VD.t()).to(exact)
            labels = labels_T[part].unsqueeze(1) - first
            on_rank = (labels >= 0) & (labels < rows)  # all, unless other ranks have parts of the vocabulary
            labels = labels.clamp(0, rows - 1)
            label_logits = comm.all_reduce_sum(logits.gather(1, labels) * on_rank)
            highest = comm.all_reduce_max(logits.amax(-1, keepdim=True))
            exponentials = logits.sub_(highest).exp_()
            sums = comm.all_reduce_sum(exponentials.sum(-1, keepdim=True))
            total += ((sums.log() + highest - label_logits).squeeze(1) * weights).sum()
            if grad_TD is None and grad_VD is None:
                continue
            scale = weights.unsqueeze(1)
            grad_logits = exponentials.mul_(scale / sums).scatter_add_(1, labels, -scale * on_rank).to(dtype)
            if grad_TD is not None:
                grad_TD[part] = grad_logits @ w_VD
            if grad_VD is not None:
                if grad_VD.dtype == dtype:
                    grad_VD.addmm_(grad_logits.t(), h_tD)
                else:
                    grad_VD += grad_logits.t() @ h_tD
        if grad_TD is not None:
            grad_TD = comm.all_reduce_sum(grad_TD)
        ctx.save_for_backward(*(grad for grad in (grad_TD, grad_VD) if grad is not None))
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        saved = list(ctx.saved_tensors)
        grad_TD = grad_VD = None
        if ctx.needs_input_grad[0]:
            grad_TD = saved.pop(0)
            grad_TD = grad_TD * grad.to(grad_TD.dtype)
        if ctx.needs_input_grad[1]:
            grad_VD = (saved.pop(0) * grad).to(ctx.weight_dtype)
        return grad_TD, grad_VD, None, None, None


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, comm: TPComm = SINGLE_RANK
) -> Tensor:
    """`sum_i weights_i * CE_i` in at least float32.

    hidden_TD: (T, D) after the last norm. weight_VD: (V, D). labels_T: (T,) int64, any valid id where the weight is 0.
    weights_T: (T,), 1 / (labelled tokens of the global batch), or 0 where there is no label. comm: tensor-parallel
    communication, if weight_VD is this rank's part of the vocabulary.
    """
    result: Tensor = _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, labels_T, weights_T, comm)
    return result
