"""Gram matrices of each token's k expert activations, of which sp and o are functions.

T tokens, K experts per token, R routed rows, F width. Forward and backward are one pass over the rows each, without a
(T, K, F) copy: on a CPU by the kernels of `csrc/kernels.c`, elsewhere by PyTorch's operations on slices of tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops import select

SLICE_ELEMENTS = 1 << 18  # gathered float32 values per slice; it stays in a CPU's cache between gather and product
GPU_SLICE_ELEMENTS = 1 << 26  # few kernel launches; the gathered rows of a slice take at most 256 MiB


def token_rows(x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T, k, F) activations as rows (T, k) and matrix (R, F) for `token_gram`; unchanged if rows are given."""
    if rows is not None:
        return rows, x
    tokens, k, width = x.shape
    return torch.arange(tokens * k, device=x.device).reshape(tokens, k), x.reshape(tokens * k, width)


def _slices(rows_TK: Tensor, width: int) -> list[Tensor]:
    tokens, k = rows_TK.shape
    elements = SLICE_ELEMENTS if rows_TK.device.type == "cpu" else GPU_SLICE_ELEMENTS
    step = max(1, elements // max(1, k * width))
    return list(rows_TK.split(step)) if tokens > step else [rows_TK]


def squares_limit(dtype: torch.dtype) -> float:
    """Squared norms between 1 / limit and limit are safe to divide by and to multiply: 2^100 for float32, 2^800 for float64."""
    return float(torch.finfo(accumulation_dtype(dtype)).max) ** (100 / 128)


def row_scales(x: Tensor, largest: float) -> Tensor:
    """Factors that keep the squares of rows in range, without a gradient: (..., F) -> (...), in at least float32.

    1 for a row whose largest entry is between 1 / largest and largest; for others 1 over that entry, at most 1 / tiny."""
    peaks = torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1).to(accumulation_dtype(x.dtype))
    return torch.where(
        (peaks >= 1 / largest) & (peaks <= largest), 1.0, 1 / peaks.clamp(min=torch.finfo(peaks.dtype).tiny)
    )


def _gather(z_RF: Tensor, rows_tK: Tensor) -> Tensor:
    return z_RF.index_select(0, rows_tK.reshape(-1)).reshape(*rows_tK.shape, z_RF.shape[-1])


def _products(z_RF: Tensor, rows_TK: Tensor, scaled: bool = False) -> tuple[Tensor, Tensor]:
    """The Gram matrices and the factors of rows (none if not scaled), by PyTorch's operations."""
    parts, scales = [], []
    for rows in _slices(rows_TK, z_RF.shape[-1]):
        x_tKF = _gather(z_RF, rows)
        if scaled:
            scales.append(row_scales(x_tKF, squares_limit(z_RF.dtype) ** 0.5))
            x_tKF = x_tKF * scales[-1].unsqueeze(2)
        x_tKF = x_tKF.to(accumulation_dtype(z_RF.dtype))
        parts.append(torch.bmm(x_tKF, x_tKF.transpose(1, 2)))
    return torch.cat(parts), torch.cat(scales) if scaled else parts[0].new_empty(0)


def _gradients(
    z_RF: Tensor, rows_TK: Tensor, coefficients_TKK: Tensor, scales_TK: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of z from those of the Gram matrices, by PyTorch's operations: slices of (row indices, gradients)."""
    start = 0
    for rows in _slices(rows_TK, z_RF.shape[-1]):
        part, x_tKF = slice(start, start + rows.shape[0]), _gather(z_RF, rows)
        if scales_TK.numel():
            x_tKF = x_tKF * scales_TK[part].unsqueeze(2)
        product = torch.bmm(coefficients_TKK[part], x_tKF.to(coefficients_TKK.dtype))
        if scales_TK.numel():
            product = product * scales_TK[part].unsqueeze(2)
        yield rows.reshape(-1), product.flatten(0, 1).to(z_RF.dtype)
        start += rows.shape[0]


def _symmetric(grad_TKK: Tensor) -> Tensor:
    """The coefficients by which the gradient of row a is a linear combination of its token's rows."""
    return grad_TKK + grad_TKK.transpose(1, 2)


def _gram(z_RF: Tensor, rows_TK: Tensor, scaled: bool = False) -> tuple[Tensor, Tensor]:
    kernel = select.kernel("token_gram", z_RF)
    if kernel is None:
        return _products(z_RF, rows_TK, scaled)
    tokens, k = rows_TK.shape
    out_TKK = z_RF.new_empty(tokens, k, k, dtype=accumulation_dtype(z_RF.dtype))
    kernel(z_RF.contiguous(), rows_TK.contiguous(), out_TKK)
    if not scaled:
        return out_TKK, out_TKK.new_empty(0)
    scales_TK = out_TKK.new_ones(tokens, k)
    # Rows are seldom so large or small that squares leave the range: only their tokens are computed again.
    squares_TK, limit = out_TKK.diagonal(dim1=1, dim2=2), squares_limit(z_RF.dtype)
    least, most = map(float, squares_TK.aminmax()) if tokens else (1.0, 1.0)
    if not (least >= 1 / limit and most <= limit):  # true for NaN
        again_T = (~((squares_TK >= 1 / limit) & (squares_TK <= limit))).any(1).nonzero().squeeze(1)
        out_TKK[again_T], scales_TK[again_T] = _products(z_RF, rows_TK[again_T], scaled)
    return out_TKK, scales_TK


_gram_op = torch.library.custom_op("torchtitan_ext::token_gram", _gram, mutates_args=())


@_gram_op.register_fake
def _(z_RF: Tensor, rows_TK: Tensor, scaled: bool = False) -> tuple[Tensor, Tensor]:
    tokens, k = rows_TK.shape
    out_TKK = z_RF.new_empty(tokens, k, k, dtype=accumulation_dtype(z_RF.dtype))
    return out_TKK, out_TKK.new_empty(tokens, k) if scaled else out_TKK.new_empty(0)


def _add_gradient(grad_RF: Tensor, z_RF: Tensor, rows_TK: Tensor, coefficients_TKK: Tensor, scales_TK: Tensor) -> None:
    kernel = select.kernel("add_gram_gradient", z_RF)
    if kernel is not None and grad_RF.is_contiguous():
        scaled_T = (scales_TK != 1).any(1).nonzero().squeeze(1) if scales_TK.numel() else None
        some = scaled_T is not None and len(scaled_T) > 0
        if scaled_T is not None and some:
            parts = _gradients(z_RF, rows_TK[scaled_T], coefficients_TKK[scaled_T], scales_TK[scaled_T])
            coefficients_TKK = coefficients_TKK.index_fill(0, scaled_T, 0.0)
        kernel(grad_RF, z_RF.contiguous(), rows_TK.contiguous(), coefficients_TKK.contiguous())
        if not some:
            return
    else:
        parts = _gradients(z_RF, rows_TK, coefficients_TKK, scales_TK)
    for rows, gradient_rF in parts:
        grad_RF.index_add_(0, rows, gradient_rF)


torch.library.custom_op("torchtitan_ext::add_gram_gradient", _add_gradient, mutates_args={"grad_RF"})


def _gram_direct_or_op(z_RF: Tensor, rows_TK: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
    """The Gram matrices and the factors of rows; through the custom operator only under torch.compile or for tensor
    subclasses, since dispatching it costs more than a small product."""
    direct = select.direct_kernel("token_gram", z_RF) is not None
    pair: tuple[Tensor, Tensor] = (_gram if direct else torch.ops.torchtitan_ext.token_gram)(z_RF, rows_TK, scaled)
    return pair


def _add_gradient_direct_or_op(
    grad_RF: Tensor, z_RF: Tensor, rows_TK: Tensor, grad_TKK: Tensor, scales_TK: Tensor
) -> None:
    """Adds the gradient from the Gram matrices to grad_RF; through the custom operator in the same cases."""
    direct = select.direct_kernel("add_gram_gradient", z_RF) is not None
    add = _add_gradient if direct else torch.ops.torchtitan_ext.add_gram_gradient
    add(grad_RF, z_RF, rows_TK, _symmetric(grad_TKK), scales_TK)


class _TokenGram(torch.autograd.Function):
    """Supports higher derivatives and torch.func. Only first derivatives outside of torch.func use the kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z_RF: Tensor, rows_TK: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
        compute = _products if select.transformed(z_RF) else _gram_direct_or_op
        return compute(z_RF, rows_TK, scaled)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_TKK: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        z_RF, rows_TK, scales_TK = ctx.saved_tensors
        grad_RF = torch.zeros_like(z_RF, memory_format=torch.contiguous_format)
        if torch.is_grad_enabled() or select.transformed(z_RF):
            parts = [gradient_rF for _, gradient_rF in _gradients(z_RF, rows_TK, _symmetric(grad_TKK), scales_TK)]
            return grad_RF.index_copy(0, rows_TK.reshape(-1), torch.cat(parts)), None, None
        _add_gradient_direct_or_op(grad_RF, z_RF, rows_TK, grad_TKK, scales_TK)
        return grad_RF, None, None


def token_gram(z_RF: Tensor, rows_TK: Tensor, scaled: bool = False) -> Tensor:
    """Inner products of each token's k rows.

    z_RF: (R, F) activations in any order. rows_TK: (T, k) int64, the row of each token and expert; no row may occur
    twice. scaled: rows whose squares would overflow or underflow are first divided by their largest entry. For functions
    that do not depend on the rows' lengths, such as `squared_cosines`. Returns (T, k, k) in at least float32."""
    result: Tensor = _TokenGram.apply(z_RF, rows_TK, scaled)[0]
    return result


class _GramThrough(torch.autograd.Function):
    """The identity on z, which also returns the Gram matrices.

    The backward adds the gradient from the Gram matrices in place to the incoming gradient of z. That saves the second
    gradient of the size of z, and the sum, that a separate function would cost."""

    @staticmethod
    def forward(ctx: Any, z_RF: Tensor, rows_TK: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
        gram_TKK, scales_TK = _gram_direct_or_op(z_RF, rows_TK, scaled)
        ctx.save_for_backward(z_RF, rows_TK, scales_TK)
        ctx.set_materialize_grads(False)
        return z_RF.view_as(z_RF), gram_TKK

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor | None, grad_TKK: Tensor | None) -> tuple[Tensor | None, None, None]:
        z_RF, rows_TK, scales_TK = ctx.saved_tensors
        if grad_TKK is None:
            return grad_RF, None, None
        if grad_RF is None:
            grad_RF = torch.zeros_like(z_RF)
        _add_gradient_direct_or_op(grad_RF, z_RF, rows_TK, grad_TKK, scales_TK)
        return grad_RF, None, None


def gram_through(z_RF: Tensor, rows_TK: Tensor, scaled: bool = False) -> tuple[Tensor, Tensor]:
    """Returns z and `token_gram(z, rows, scaled)`. The caller must use the returned z, not the argument.

    The operation that consumes the returned z must produce a new gradient tensor, since the backward writes into it.
    First derivatives only."""
    through: tuple[Tensor, Tensor] = _GramThrough.apply(z_RF, rows_TK, scaled)
    return through


def squared_norms(gram_TKK: Tensor) -> Tensor:
    """The diagonals, (T, k, k) -> (T, k), by a masked sum: torch 2.13's inductor gives wrong gradients when `diagonal` is
    not a tensor's only use (tests/model/test_transformer.py, the test of compilation)."""
    identity = torch.eye(gram_TKK.shape[1], dtype=torch.bool, device=gram_TKK.device)
    return torch.where(identity, gram_TKK, 0.0).sum(2)


def squared_cosines(gram_TKK: Tensor, floor: float = 0.0) -> Tensor:
    """Sum over ordered pairs a != b of max(squared cosine - floor, 0), per token: (T, k, k) -> (T,).

    A zero vector has cosine 0 with every other, and gradient 0. So has one whose squared norm is below the smallest normal
    number; `token_gram(scaled=True)` gives squared norms in range.
    """
    if torch.compiler.is_compiling() or select.transformed(gram_TKK):
        return _squared_cosines(gram_TKK, floor)
    result: Tensor = _SquaredCosines.apply(gram_TKK, floor)
    return result


class _SquaredCosines(torch.autograd.Function):
    """Computes the gradient in the forward, to save no intermediates; second derivatives use autograd."""

    @staticmethod
    def forward(ctx: Any, gram_TKK: Tensor, floor: float) -> Tensor:
        kernel = select.direct_kernel("squared_cosines", gram_TKK)
        if kernel is not None:
            values_T, gradient_TKK = gram_TKK.new_empty(gram_TKK.shape[0]), torch.empty_like(gram_TKK).contiguous()
            kernel(gram_TKK.contiguous(), floor, values_T, gradient_TKK)
        else:
            values_T, gradient_TKK = _value_and_gradient(gram_TKK, floor)
        ctx.save_for_backward(gram_TKK, gradient_TKK)
        ctx.floor = floor
        return values_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        gram_TKK, gradient_TKK = ctx.saved_tensors
        if torch.is_grad_enabled():
            values_T = _squared_cosines(gram_TKK, ctx.floor)
            return torch.autograd.grad(values_T, gram_TKK, grad_T, create_graph=True)[0], None
        return gradient_TKK * grad_T[:, None, None], None


def _value_and_gradient(gram_TKK: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The result of the kernel, by PyTorch's operations: squared cosines (T,) and their gradient (T, k, k)."""
    norms_TK = squared_norms(gram_TKK)
    positive = ~(norms_TK < torch.finfo(norms_TK.dtype).tiny)
    inverse_TK = positive / torch.where(positive, norms_TK, 1.0)
    slopes_TKK = gram_TKK * inverse_TK.unsqueeze(2) * inverse_TK.unsqueeze(1)
    squares_TKK = gram_TKK * slopes_TKK
    identity = torch.eye(gram_TKK.shape[1], dtype=torch.bool, device=gram_TKK.device)
    included = ~((squares_TKK <= floor) | identity)  # NaN <= floor is false, so a NaN propagates
    values_T = torch.where(included, squares_TKK - floor, 0.0).sum((1, 2))
    squares_TKK = torch.where(included, squares_TKK, 0.0)
    diagonal_TK = -inverse_TK * (squares_TKK.sum(2) + squares_TKK.sum(1))
    off_diagonal_TKK = torch.where(included, 2.0 * slopes_TKK, 0.0)
    return values_T, torch.where(identity, diagonal_TK.unsqueeze(2), off_diagonal_TKK)


def _squared_cosines(gram_TKK: Tensor, floor: float) -> Tensor:
    """`squared_cosines` in operations that autograd and torch.compile differentiate."""
    norms_TK = squared_norms(gram_TKK)
    positive = ~(norms_TK < torch.finfo(norms_TK.dtype).tiny)
    inverse_TK = torch.where(positive, norms_TK, 1.0).rsqrt() * positive
    cosine_TKK = gram_TKK * inverse_TK.unsqueeze(2) * inverse_TK.unsqueeze(1)
    k = gram_TKK.shape[1]
    off_diagonal = ~torch.eye(k, dtype=torch.bool, device=gram_TKK.device)
    squares_TKK = cosine_TKK.square()
    if floor > 0.0:
        squares_TKK = (squares_TKK - floor).relu()
    return (squares_TKK * off_diagonal).sum((1, 2))


def squared_projections(gram_TKK: Tensor, eps: float) -> Tensor:
    """Sum over ordered pairs a != b of `|| <a,b> / (<b,b> + eps) b ||^2`, per token: (T, k, k) -> (T,)."""
    norms_TK = squared_norms(gram_TKK)
    # Where squares of inner products would overflow, the token's largest squared norm becomes the unit.
    largest_T1 = norms_TK.detach().amax(1, keepdim=True)
    unit_T1 = torch.where(largest_T1 > torch.finfo(gram_TKK.dtype).max ** (60 / 128), 1 / largest_T1, 1.0)
    gram_TKK, norms_TK = gram_TKK * unit_T1.unsqueeze(2), norms_TK * unit_T1
    factor_TK = norms_TK / (norms_TK + eps * unit_T1).square()
    k = gram_TKK.shape[1]
    off_diagonal = ~torch.eye(k, dtype=torch.bool, device=gram_TKK.device)
    return (gram_TKK.square() * factor_TK.unsqueeze(1) * off_diagonal).sum((1, 2)) / unit_T1.squeeze(1)


def squared_span_projections(gram_TKK: Tensor) -> Tensor:
    """Mean over a of the squared norm of row a's projection on the span of the other rows: (T, k, k) -> (T,).

    That norm is `g' H^+ g`, with g the inner products of row a with the others and H the Gram matrix of the others.
    Eigenvalues of H below rounding error count as 0."""
    tokens, k, _ = gram_TKK.shape
    if k == 1 or tokens == 0:
        return gram_TKK.sum((1, 2)) * 0.0
    rows = torch.arange(k, device=gram_TKK.device).unsqueeze(1)
    others = rows[:-1, 0] + (rows[:-1, 0] >= rows)  # row a: the indices without a
    g = gram_TKK[:, rows, others]
    h = gram_TKK[:, others.unsqueeze(2), others.unsqueeze(1)]
    inverse = torch.linalg.pinv(h, hermitian=True, rtol=10 * k * torch.finfo(h.dtype).eps)
    return (g.unsqueeze(2) @ inverse @ g.unsqueeze(3)).squeeze((2, 3)).mean(1)
