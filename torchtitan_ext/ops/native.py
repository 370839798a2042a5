"""The package's C kernels, compiled when first used and kept in the user's cache directory (build.py).

Without a C compiler, on other systems than Linux, or with TITAN_MOE_KERNELS=0 in the environment, `library()` is None and
callers use PyTorch's operations: the same results, but slower.
"""

import ctypes
import functools
import logging
import os
import subprocess
import sys

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchtitan_ext.ops import build

SUFFIX = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
BFLOAT16 = ("token_gram", "add_gram_gradient", "responses", "add_response_gradients")  # kernels that take it too
BFLOAT16_ONLY = ("swiglu", "swiglu_backward")  # in other types PyTorch's operations are as good
DRAWS = ("uniform", "sample")  # kernels that take integers
PANEL, STRIP = 16, 48  # as in kernels.c

log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None when there are none, whose reason is logged once as a warning."""
    if sys.platform != "linux" or os.environ.get("TITAN_MOE_KERNELS") == "0":
        return None
    try:
        return build.load()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(f"The losses' C kernels can't be used; PyTorch's slower operations are used instead: {error}")
        return None


def supports(operation: str, x: Tensor) -> bool:
    """Whether there is a kernel of this operation for the tensor's device, dtype and width."""
    if x.device.type != "cpu" or library() is None:
        return False
    if operation in DRAWS:
        return x.dtype == torch.int64
    if x.dtype not in SUFFIX:
        return False
    if operation in ("responses", "add_response_gradients") and x.shape[-1] % PANEL:
        return False
    if operation in BFLOAT16_ONLY:
        return x.dtype == torch.bfloat16
    return x.dtype != torch.bfloat16 or operation in BFLOAT16


@functools.cache
def tiles() -> bool:
    """Whether the CPU has units for tiles of bfloat16 (AMX), which the grouped products use, and lets this process use
    them."""
    kernels = library()
    return kernels is not None and bool(kernels.grouped_available())


def grouped(x_RD: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
    """Row r times the transposed weight of its expert, rounded once to bfloat16: (R, D), (E, N, D) -> (R, N).

    x: bfloat16, its rows sorted by expert. weight: bfloat16 or float32, rounded to bfloat16. offsets: (E,) int32, the end of
    each expert's rows. Needs `tiles()`, as do the two below."""
    out_RN = x_RD.new_empty(len(x_RD), weight_END.shape[1])
    tensors = (x_RD.contiguous(), weight_END.contiguous(), _ends(offsets_E, len(x_RD)), out_RN)
    _call("grouped_forward", weight_END.dtype, tensors, tuple(weight_END.shape))
    return out_RN


def grouped_rows_gradient(grad_RN: Tensor, weight_END: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient of x from that of `grouped`, rounded once to bfloat16: (R, N), (E, N, D) -> (R, D)."""
    grad_RD = grad_RN.new_empty(len(grad_RN), weight_END.shape[2])
    tensors = (grad_RN.contiguous(), weight_END.contiguous(), _ends(offsets_E, len(grad_RN)), grad_RD)
    _call("grouped_backward_rows", weight_END.dtype, tensors, tuple(weight_END.shape))
    return grad_RD


def grouped_weight_gradient(grad_RN: Tensor, x_RD: Tensor, offsets_E: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the weight, (E, N, D), in bfloat16 or in float32 without rounding."""
    sizes = (len(offsets_E), grad_RN.shape[1], x_RD.shape[1])
    grad_END = grad_RN.new_empty(sizes, dtype=dtype)
    tensors = (grad_RN.contiguous(), x_RD.contiguous(), _ends(offsets_E, len(x_RD)), grad_END)
    _call("grouped_backward_weight", dtype, tensors, sizes)
    return grad_END


def _ends(offsets_E: Tensor, rows: int) -> Tensor:
    """The offsets as the kernels read them. Raises IndexError for offsets beyond the rows."""
    ends = offsets_E.to(torch.int32).contiguous()
    if len(ends) and not 0 <= int(ends[-1]) <= rows:
        raise IndexError(f"the experts have {int(ends[-1])} rows, but there are {rows}")
    return ends


def token_gram(z_RF: Tensor, rows_TK: Tensor, out_TKK: Tensor) -> None:
    """`out[t, a, b] = <z[rows[t, a]], z[rows[t, b]]>`; all contiguous, out in at least float32."""
    tokens, k = rows_TK.shape
    _call("token_gram", z_RF.dtype, (z_RF, rows_TK, out_TKK), (tokens, k, z_RF.shape[1]))


def add_gram_gradient(grad_RF: Tensor, z_RF: Tensor, rows_TK: Tensor, coefficients_TKK: Tensor) -> None:
    """`grad[rows[t, a]] += sum_b coefficients[t, a, b] z[rows[t, b]]`; all contiguous, rows unique."""
    tokens, k = rows_TK.shape
    _call("add_gram_gradient", z_RF.dtype, (grad_RF, z_RF, rows_TK, coefficients_TKK), (tokens, k, z_RF.shape[1]))


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves: (R, 2F) -> (R, F). Rounded once, from float32."""
    gate_up = gate_up.contiguous()
    z_RF = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _call("swiglu", gate_up.dtype, (gate_up, z_RF), tuple(z_RF.shape))
    return z_RF


def swiglu_backward(gate_up: Tensor, dz_RF: Tensor) -> Tensor:
    """The gradient of gate_up (R, 2F) from that of z (R, F)."""
    gate_up, gradient = gate_up.contiguous(), torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    _call("swiglu_backward", gate_up.dtype, (gate_up, dz_RF.contiguous(), gradient), tuple(dz_RF.shape))
    return gradient


def largest(scores_TE: Tensor, ids_TK: Tensor) -> None:
    """`ids[t]`: the indices of the k largest of `scores[t]`, largest first; contiguous, float32 or float64."""
    tokens, k = ids_TK.shape
    _call("largest", scores_TE.dtype, (scores_TE, ids_TK), (tokens, scores_TE.shape[1], k))


def squared_cosines(gram_TKK: Tensor, floor: float, values_T: Tensor, gradient_TKK: Tensor) -> None:
    """`gram.squared_cosines` and its gradient; all contiguous, of one dtype, float32 or float64."""
    tokens, k, _ = gram_TKK.shape
    _call("squared_cosines", gram_TKK.dtype, (gram_TKK, values_T, gradient_TKK), (tokens, k), ctypes.c_double(floor))


def responses(weight_JGD: Tensor, proxies_ED: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`answers[j, f, e] = <weight[j, f], proxies[e]>` for f < width, (J, width, E), and `answers.square().sum(1).t()`.

    D must be a multiple of PANEL.
    """
    experts, rows, dim = weight_JGD.shape
    vectors = len(proxies_ED)
    padded = pad(proxies_ED, (0, 0, 0, -vectors % PANEL)) if vectors % PANEL else proxies_ED
    packed = padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    answers_JFE = proxies_ED.new_empty(experts, width, vectors)
    squares_JSE = proxies_ED.new_empty(experts, -(-width // STRIP), vectors)
    tensors = (weight_JGD, packed, answers_JFE, squares_JSE)
    _call("responses", weight_JGD.dtype, tensors, (experts, rows, width, dim, vectors))
    return answers_JFE, squares_JSE.sum(1).t()


def add_response_gradients(
    grad_JGD: Tensor, weight_JGD: Tensor, proxies_ED: Tensor, answers_JFE: Tensor, grad_EJ: Tensor, of_proxies: bool
) -> Tensor | None:
    """The backward of `responses` from grad_EJ, the gradient of `answers.square().sum(1).t()`. Adds the weight's
    gradient to grad_JGD; returns the proxies' gradient (E, D) if `of_proxies`."""
    experts, rows, dim = weight_JGD.shape
    vectors, width = len(proxies_ED), answers_JFE.shape[1]
    packed = proxies_ED.unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous()
    parts = packed.new_zeros(torch.get_num_threads(), *packed.shape) if of_proxies else None
    tensors = (grad_JGD, weight_JGD, packed, answers_JFE, grad_EJ.t().contiguous(), parts)
    _call("add_response_gradients", weight_JGD.dtype, tensors, (experts, rows, width, dim, vectors))
    return None if parts is None else parts.sum(0).transpose(0, 1).flatten(1)


def coupling_bounds(router_ED: Tensor) -> Tensor:
    """`losses.coupling_noise_bound`, for float32 or float64."""
    bounds_E = router_ED.new_empty(len(router_ED))
    _call("coupling_bounds", router_ED.dtype, (router_ED.contiguous(), bounds_E), tuple(router_ED.shape))
    return bounds_E


def excess_slopes(matrix_EE: Tensor, alpha: float) -> Tensor:
    """The gradient of `losses.coupling_excess`, for float32 or float64."""
    slopes_EE = torch.empty_like(matrix_EE, memory_format=torch.contiguous_format)
    tensors = (matrix_EE.contiguous(), slopes_EE)
    _call("excess_slopes", matrix_EE.dtype, tensors, (len(matrix_EE),), ctypes.c_double(alpha))
    return slopes_EE


def uniform(rows_B: Tensor, columns_S: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """`draws.keyed_uniform`, (B, S). start: the bits of its key. rows and columns: int64. dtype: float32 or float64."""
    values = torch.empty(len(rows_B), len(columns_S), dtype=dtype)
    sizes = (len(rows_B), len(columns_S), start)
    _call("uniform", dtype, (rows_B.contiguous(), columns_S.contiguous(), values), sizes)
    return values


def sample(rows_B: Tensor, columns_S: Tensor, start: int, limit: int) -> Tensor:
    """Flat indices into (B, S) of the elements whose `draws.keyed_bits`, extended from `start`, are below `limit`."""
    kernels = library()
    assert kernels is not None
    rows_B, columns_S = rows_B.contiguous(), columns_S.contiguous()
    height, width = len(rows_B), len(columns_S)
    indices = torch.empty(height * width, dtype=torch.int64)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows_B, columns_S, indices)]
    kernels.sample.restype = ctypes.c_int64
    return indices[: kernels.sample(*pointers, *map(ctypes.c_int64, (height, width, start, limit)))]


def _call(
    name: str, dtype: torch.dtype, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], *numbers: ctypes.c_double
) -> None:
    kernels = library()
    assert kernels is not None
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous()
    function = getattr(kernels, f"{name}_{SUFFIX[dtype]}")
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    function(*pointers, *map(ctypes.c_int64, sizes), *numbers, ctypes.c_int(torch.get_num_threads()))
