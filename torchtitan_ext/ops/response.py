"""How strongly every expert answers every routing vector: erc's matrix, taken on the way of the weights to the experts.

E experts, J of them here (all, or one rank's), F expert hidden width, D model width, G rows of a weight that holds the gate
projection in its first F.
"""

from typing import Any

import torch
from torch import Tensor

from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops import native


class _ResponseThrough(torch.autograd.Function):
    """The identity on the weights, and the answers beside it. The backward adds to the gradient that comes back, in place."""

    @staticmethod
    def forward(ctx: Any, weight_JGD: Tensor, proxies_ED: Tensor, width: int) -> tuple[Tensor, Tensor]:
        ctx.by_kernel = native.direct(weight_JGD) and proxies_ED.shape[1] % native.PANEL == 0
        if ctx.by_kernel:
            answers_JFE, squares_EJ = native.responses(weight_JGD.contiguous(), proxies_ED.contiguous(), width)
        else:
            gate_JFD = weight_JGD[:, :width].to(proxies_ED.dtype)
            answers_JFE = torch.matmul(proxies_ED, gate_JFD.transpose(1, 2)).transpose(1, 2)
            squares_EJ = answers_JFE.square().sum(1).t()
        ctx.save_for_backward(weight_JGD, proxies_ED, answers_JFE)
        ctx.width = width
        ctx.set_materialize_grads(False)
        return weight_JGD.view_as(weight_JGD), squares_EJ

    @staticmethod
    def backward(
        ctx: Any, grad_JGD: Tensor | None, grad_EJ: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        weight_JGD, proxies_ED, answers_JFE = ctx.saved_tensors
        if grad_EJ is None:
            return grad_JGD, None, None
        if grad_JGD is None:
            grad_JGD = torch.zeros_like(weight_JGD)
        if ctx.by_kernel and grad_JGD.is_contiguous() and grad_JGD.dtype == weight_JGD.dtype:
            tensors = (weight_JGD.contiguous(), proxies_ED.contiguous(), answers_JFE, grad_EJ)
            return grad_JGD, native.add_response_gradients(grad_JGD, *tensors, ctx.needs_input_grad[1]), None
        slopes_JFE = answers_JFE * (2.0 * grad_EJ.t()).unsqueeze(1)
        grad_gate_JFD = grad_JGD[:, : ctx.width]
        proxies_JED = proxies_ED.expand(weight_JGD.shape[0], *proxies_ED.shape)
        if grad_JGD.dtype == proxies_ED.dtype:
            grad_gate_JFD.baddbmm_(slopes_JFE, proxies_JED)
        else:
            grad_gate_JFD += torch.bmm(slopes_JFE, proxies_JED)
        grad_proxies_ED = None
        if ctx.needs_input_grad[1]:
            grad_proxies_ED = torch.bmm(
                slopes_JFE.transpose(1, 2), weight_JGD[:, : ctx.width].to(slopes_JFE.dtype)
            ).sum(0)
        return grad_JGD, grad_proxies_ED, None


# torch 2.13's compiler refuses a sharded weight here: a view of it leaves an autograd.Function.
_outside_of_graphs = torch.compiler.disable(_ResponseThrough.apply)


def response_through(weight_JGD: Tensor, proxies_ED: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The weights again, and `|| W_gate^j proxy_i ||^2` of the experts j in them, (E, J): sums over hidden units, so that ranks
    with parts of them add up.

    For a caller that goes on with the returned weights; whatever consumes them must give back a gradient of its own making,
    since the backward writes into it. proxies: in at least float32. First derivatives only.
    """
    assert proxies_ED.dtype == accumulation_dtype(weight_JGD.dtype)
    # Only where it is needed: the wrapper takes its time.
    apply = _outside_of_graphs if torch.compiler.is_compiling() else _ResponseThrough.apply
    through: tuple[Tensor, Tensor] = apply(weight_JGD, proxies_ED, width)
    return through


def lengths(squares: Tensor) -> Tensor:
    """M from its squares; the gradient of a zero answer is 0."""
    zero = squares == 0
    return (squares + zero).sqrt() * ~zero
