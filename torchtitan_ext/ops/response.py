"""erc's matrix: the norm of every expert's gate projection of every routing vector ("proxy").

E experts, J of them local (all, or one rank's), F expert hidden width, D model width, G rows of a weight whose first F
rows are the gate projection.
"""

from typing import Any

import torch
from torch import Tensor

from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops import select


class _ResponseThrough(torch.autograd.Function):
    """The identity on the weights, plus the squared norms, whose gradient the backward adds in place to the weights'."""

    @staticmethod
    def forward(ctx: Any, weight_JGD: Tensor, proxies_ED: Tensor, width: int) -> tuple[Tensor, Tensor]:
        kernel = select.direct_kernel("responses", weight_JGD)
        ctx.backward_kernel = select.direct_kernel("add_response_gradients", weight_JGD)
        if kernel is not None:
            answers_JFE, squares_EJ = kernel(weight_JGD.contiguous(), proxies_ED.contiguous(), width)
        else:
            answers_JFE = _answers(weight_JGD, proxies_ED, width)
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
        if ctx.backward_kernel is not None and grad_JGD.is_contiguous() and grad_JGD.dtype == weight_JGD.dtype:
            tensors = (weight_JGD.contiguous(), proxies_ED.contiguous(), answers_JFE, grad_EJ)
            return grad_JGD, ctx.backward_kernel(grad_JGD, *tensors, ctx.needs_input_grad[1]), None
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


def _answers(weight_JGD: Tensor, proxies_ED: Tensor, width: int) -> Tensor:
    """Every expert's gate projection of every proxy, (J, F, E)."""
    gate_JFD = weight_JGD[:, :width].to(proxies_ED.dtype)
    return torch.matmul(proxies_ED, gate_JFD.transpose(1, 2)).transpose(1, 2)


def response_through(weight_JGD: Tensor, proxies_ED: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Returns the weights and `|| W_gate^j proxy_i ||^2` of their experts j, (E, J).

    These are sums over hidden units, so ranks with different hidden units add them up. The caller must use the returned
    weights. The operation that consumes them must produce a new gradient tensor, since the backward writes into it.
    proxies: in at least float32. First derivatives only."""
    assert proxies_ED.dtype == accumulation_dtype(weight_JGD.dtype)
    if torch.compiler.is_compiling():
        # A compiler adds the two gradients itself, and refuses an autograd.Function that returns a view of a sharded weight.
        return weight_JGD, _answers(weight_JGD, proxies_ED, width).square().sum(1).t()
    through: tuple[Tensor, Tensor] = _ResponseThrough.apply(weight_JGD, proxies_ED, width)
    return through


def safe_sqrt(squares: Tensor) -> Tensor:
    """M from its squares; where they are 0 the gradient is 0, not infinite."""
    zero = squares == 0
    return (squares + zero).sqrt() * ~zero


@torch.no_grad()
def coupling_noise_bound(router_weight: Tensor) -> Tensor:
    """eps_i of erc: half the distance to the nearest other routing vector over the vector's own norm, (E, D) -> (E,).

    Squares must fit the dtype: norms and distances from 1e-19 to 1e19 in float32; below them eps is 0, above it is NaN."""
    kernel = select.direct_kernel("coupling_bounds", router_weight)
    if kernel is not None:
        bounds: Tensor = kernel(router_weight)
        return bounds
    distances = torch.cdist(router_weight, router_weight, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    return distances.amin(1) / (2.0 * router_weight.norm(dim=1)).clamp(min=torch.finfo(router_weight.dtype).tiny)


def coupling_noise(router_weight: Tensor, uniform: Tensor) -> Tensor:
    """erc's delta ~ U(1 - eps_i, 1 + eps_i) from uniform numbers in [0, 1): (E, D), (E, D) -> (E, D)."""
    bound = coupling_noise_bound(router_weight).unsqueeze(1)
    return torch.addcmul(1.0 - bound, uniform, 2.0 * bound)


def coupling_matrix(probes: Tensor, gate_weight: Tensor) -> Tensor:
    """erc's M: norms of every expert's gate projection of every probe, (E, D), (E, F, D) -> (E, E).

    The gradient of a zero projection is 0.
    """
    gate_weight = gate_weight.to(accumulation_dtype(gate_weight.dtype))
    activations_jiF = torch.matmul(probes, gate_weight.transpose(1, 2))
    return safe_sqrt(activations_jiF.square().sum(-1).t())


def coupling_excess(matrix: Tensor, alpha: float) -> Tensor:
    """erc from its matrix M (E, E): `(1/E^2) sum_{i != j} max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0)`."""
    kernel = select.direct_kernel("excess_slopes", matrix)
    if kernel is not None:
        slopes: Tensor = kernel(matrix.detach(), alpha)
        return (slopes * matrix).sum()
    experts = matrix.shape[0]
    identity = torch.eye(experts, dtype=torch.bool, device=matrix.device)
    diagonal = alpha * torch.where(identity, matrix, 0.0).sum(1, keepdim=True)  # not `diagonal`: see gram.squared_norms
    excess = (matrix - diagonal).relu() + (matrix.t() - diagonal).relu()
    return (excess * ~identity).sum() / experts**2
