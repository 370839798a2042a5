"""Vocabulary projection and cross-entropy, a slice of the tokens at a time, so that all logits never exist at once.

On a GPU slices are longer, one kernel turns a slice's logits into their gradient, and the weight's gradient is summed by the
product itself, in float32. T tokens, t of them in a slice, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from titan_moe.model.comm import SINGLE_RANK, TPComm
from titan_moe.model.gemm import product_dtype
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops import select

SLICE_LOGITS = 1 << 24  # logits alive at once on a CPU: 64 MiB in float32; smaller slices slow the products down
GPU_SLICE_BYTES = 1 << 29  # the same on a GPU, in the type of the products
GPU_SLICE_TOKENS = 4096
"""At least so many tokens a slice on a GPU, whatever the vocabulary. Each slice reads and writes the weight's float32 gradient,
8 V D bytes, beside a product of 2 t V D FLOPs: at 4,096 tokens 1,024 FLOPs a byte, four times what an H100 does per byte."""


def slice_tokens(vocabulary: int, dtype: torch.dtype, on_cpu: bool) -> int:
    """Tokens whose logits exist at once. vocabulary: this rank's part."""
    if on_cpu:
        return max(1, SLICE_LOGITS // vocabulary)
    return max(GPU_SLICE_TOKENS, GPU_SLICE_BYTES // (vocabulary * dtype.itemsize))


def _slice_loss(
    logits_tV: Tensor, labels_t: Tensor, weights_t: Tensor, first: int, comm: TPComm, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The weighted sum of a slice's cross-entropies, and their gradient in the type of the logits, which are overwritten.

    first: the vocabulary index of this rank's first column."""
    if select.fused(logits_tV):
        return _fused_slice_loss(logits_tV, labels_t - first, weights_t, comm, with_gradient)
    dtype, exact, rows = logits_tV.dtype, accumulation_dtype(logits_tV.dtype), logits_tV.shape[1]
    logits = logits_tV.to(exact)
    labels = labels_t.unsqueeze(1) - first
    on_rank = (labels >= 0) & (labels < rows)  # all, unless other ranks have parts of the vocabulary
    labels = labels.clamp(0, rows - 1)
    label_logits = comm.all_reduce_sum(logits.gather(1, labels) * on_rank)
    highest = comm.all_reduce_max(logits.amax(-1, keepdim=True))
    exponentials = logits.sub_(highest).exp_()
    sums = comm.all_reduce_sum(exponentials.sum(-1, keepdim=True))
    loss = ((sums.log() + highest - label_logits).squeeze(1) * weights_t).sum()
    if not with_gradient:
        return loss, None
    scale = weights_t.unsqueeze(1)
    return loss, exponentials.mul_(scale / sums).scatter_add_(1, labels, -scale * on_rank).to(dtype)


def _fused_slice_loss(
    logits_tV: Tensor, columns_t: Tensor, weights_t: Tensor, comm: TPComm, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The same by a kernel. Where ranks share the vocabulary by two: the sums over the ranks come between.

    columns: of the labels; those of other ranks are below 0 or not below V."""
    operators = torch.ops.torchtitan_ext
    if comm is SINGLE_RANK:
        highest, sums, label_logits = operators.cross_entropy_(logits_tV, columns_t, weights_t, with_gradient)
    else:
        own, sums, label_logits = operators.cross_entropy_(logits_tV, columns_t, weights_t, False)
        highest = comm.all_reduce_max(own)
        sums = comm.all_reduce_sum(sums * (own - highest).exp())
        label_logits = comm.all_reduce_sum(label_logits)
        if with_gradient:
            operators.cross_entropy_gradient_(logits_tV, columns_t, weights_t, highest, sums)
    loss = ((sums.log() + highest - label_logits) * weights_t).sum()
    return loss, logits_tV if with_gradient else None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`. On a GPU the product of half precision is added in float32 as it is formed, without being rounded."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


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
        first = comm.shard_offset(weight_VD.shape[0])
        step = slice_tokens(weight_VD.shape[0], dtype, hidden_TD.device.type == "cpu")
        for start in range(0, hidden_TD.shape[0], step):
            part = slice(start, start + step)
            h_tD, weights_t = hidden_TD[part].to(dtype), weights_T[part].to(exact)
            arguments = (labels_T[part], weights_t, first, comm, need_hidden or need_weight)
            loss, grad_tV = _slice_loss(h_tD @ w_VD.t(), *arguments)
            total += loss
            if grad_TD is not None and grad_tV is not None:
                grad_TD[part] = grad_tV @ w_VD
            if grad_VD is not None and grad_tV is not None:
                _add_product(grad_VD, grad_tV.t(), h_tD)
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
