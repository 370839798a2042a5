"""Which kernel computes an operation: the one place that chooses by device and dtype.

A set of kernels is a module with functions named after operations, and `supports(operation, x)`. To add one (in Triton,
say), give its functions the names and signatures of those in `native.py`, and add the module to KERNELS, before the ones
that it replaces.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from torchtitan_ext.ops import native

KERNELS = (native,)


def kernel(operation: str, x: Tensor) -> Callable[..., Any] | None:
    """The kernel of an operation for this tensor; None: use PyTorch's operations."""
    for kernels in KERNELS:
        if kernels.supports(operation, x):
            return getattr(kernels, operation)
    return None


def direct_kernel(operation: str, x: Tensor) -> Callable[..., Any] | None:
    """The same, if it may be called without a custom operator: not under torch.compile or torch.func, and on no subclass."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, Parameter) or transformed(x):
        return None
    return kernel(operation, x)


def transformed(x: Tensor) -> bool:
    """Whether a transform of torch.func (vmap, grad) wraps this tensor; kernels need plain tensors."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)
