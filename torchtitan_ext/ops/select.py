"""Which kernel computes an operation: the one place that chooses by device and dtype.

CPU tensors: the C kernels of `native.py`. A set of kernels is a module with functions named after operations, and
`supports(operation, x)`; those of KERNELS are asked in order.

CUDA tensors: the Triton kernels of `torchtitan_ext/kernels`, which join operations that PyTorch does one by one. They are
operators torch.ops.torchtitan_ext.*, and `fused` says whether to call them.

The environment variable TITAN_MOE_KERNELS, read when the process starts:
    0           no kernels of either kind: PyTorch's operations
    interpret   with TRITON_INTERPRET=1: the Triton kernels for CPU tensors too, in Triton's interpreter (slow; for tests)
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import torchtitan_ext.kernels.operators  # noqa: F401 - defines the operators
from torchtitan_ext.ops import native

KERNELS = (native,)

log = logging.getLogger(__name__)


def _triton_devices() -> tuple[str, ...]:
    """The types of device whose tensors the Triton kernels take."""
    switch = os.environ.get("TITAN_MOE_KERNELS")
    found = importlib.util.find_spec("triton") is not None
    if switch == "interpret" and not (found and os.environ.get("TRITON_INTERPRET") == "1"):
        log.warning("TITAN_MOE_KERNELS=interpret has no effect: it needs the package triton and TRITON_INTERPRET=1")
    elif switch == "interpret":
        return ("cpu", "cuda")
    return ("cuda",) if found and switch != "0" and torch.version.hip is None else ()


TRITON_DEVICES = _triton_devices()
TRITON_DTYPES = (torch.bfloat16, torch.float32)


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


def fused(x: Tensor) -> bool:
    """Whether the Triton kernels compute on this tensor: by device and dtype, and not in a transform of torch.func."""
    if x.device.type not in TRITON_DEVICES or x.dtype not in TRITON_DTYPES or transformed(x):
        return False
    return x.device.type != "cuda" or _tensor_cores()


@torch.compiler.assume_constant_result
def _tensor_cores() -> bool:
    """Whether the GPU multiplies bfloat16 and tf32. A function of its own, since torch.compile warns of traced caches."""
    return _capable()


@functools.cache
def _capable() -> bool:
    """Compute capability 8.0 or more. True where there is no GPU to ask."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
