"""The router's product on a GPU: bfloat16 tensor cores, with the accuracy of a float32 product.

A GPU multiplies float32 ten times slower than bfloat16, and x would first be written in float32. A float32 number is the sum
of three bfloat16 numbers: each takes the 8 leading bits of what is left, and float32 has 24. x is bfloat16 already. So
`x @ W.T = x @ W1.T + x @ W2.T + x @ W3.T`, where every product of two numbers is exact in float32, and only sums round.

Error: a sum of n float32 numbers in any order is off by at most n u S, u = 2^-24 and S the sum of their magnitudes. Here three
such sums of D products are added: at most (D + 2) u S, with S = sum |x| (|w1| + |w2| + |w3|) <= 1.01 sum |x w|, as |w2| <= 2^-8
|w| and |w3| <= 2^-16 |w|. A float32 product has D u S (and rounds its products too). Tensor cores cut sums off instead of
rounding them, which doubles u in both bounds; PyTorch's float32 product has cuBLAS's order of sums, so neither is unique.

T tokens, D model width, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_ext.ops import select


def parts_of(x: Tensor, count: int = 3) -> list[Tensor]:
    """bfloat16 tensors with sum x: exactly for three parts of float32 numbers above 2^-110, to 2^-16 |x| for two."""
    parts, rest = [], x
    for _ in range(count):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].to(x.dtype)
    return parts


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of bfloat16 in float32. On a CPU, for tests: products of bfloat16 are exact in float32 there too."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _SplitProduct(torch.autograd.Function):
    """One product with the three parts side by side, so that x is read once."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        logits_TP = _wide_product(x_TD, torch.cat(parts_of(weight_ED)).t())
        return logits_TP.unflatten(1, (3, -1)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        first, second, third = parts_of(grad_TE)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # Rounded to bfloat16, so 2^-16 of the magnitudes may be missing: of (g1 + g2) (W1 + W2) the product g2 W2.
            w1, w2 = parts_of(weight_ED, 2)
            grad_x = torch.cat([first, second, first], 1) @ torch.cat([w1, w1, w2])
        if ctx.needs_input_grad[1]:
            grad_weight = _wide_product(torch.cat([first, second, third], 1).t(), x_TD).unflatten(0, (3, -1)).sum(0)
        return grad_x, grad_weight


def splits(x: Tensor) -> bool:
    """Whether the product of these tokens is computed so: bfloat16 where the kernels for GPUs are on."""
    return x.dtype == torch.bfloat16 and select.fused(x)


def router_product(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits in float32: (T, D) bfloat16, (E, D) float32 -> (T, E)."""
    logits_TE: Tensor = _SplitProduct.apply(x_TD, weight_ED)
    return logits_TE
