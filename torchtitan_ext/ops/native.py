"""The package's C kernels: compiled on this machine the first time they are wanted, kept in the user's cache.

Without a C compiler, or on another system than Linux, `library()` is None and callers take PyTorch's operations instead: the
same results, slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

SOURCE = Path(__file__).with_name("csrc") / "kernels.c"
# OpenMP's runtime is the one that PyTorch has loaded already, so both share their threads.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
SUFFIX = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
COMPILE_SECONDS = 120
PANEL, STRIP = 16, 48  # of kernels.c

log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they can't be had (said once, as a warning)."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            f"The losses' C kernels can't be compiled here, PyTorch's slower operations take their place: {error}"
        )
        return None


def handles(z: Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return z.device.type == "cpu" and z.dtype in SUFFIX and library() is not None


def direct(x: Tensor, half: bool = True) -> bool:
    """Whether a kernel may be called here and now, with no operator around it for a compiler or a transform to see. half: it
    takes bfloat16 too."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, Parameter):
        return False
    return handles(x) and (half or x.dtype != torch.bfloat16) and not transformed(x)


def transformed(x: Tensor) -> bool:
    """Whether a transform of torch.func (vmap, grad) wraps this tensor, which no kernel sees through."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)


def token_gram(z_RF: Tensor, rows_TK: Tensor, out_TKK: Tensor) -> None:
    """`out[t, a, b] = <z[rows[t, a]], z[rows[t, b]]>`; all contiguous, out in at least float32."""
    tokens, k = rows_TK.shape
    _call("token_gram", z_RF.dtype, (z_RF, rows_TK, out_TKK), (tokens, k, z_RF.shape[1]))


def add_gram_gradient(grad_RF: Tensor, z_RF: Tensor, rows_TK: Tensor, coefficients_TKK: Tensor) -> None:
    """`grad[rows[t, a]] += sum_b coefficients[t, a, b] z[rows[t, b]]`; all contiguous, each row at most once in rows."""
    tokens, k = rows_TK.shape
    _call("add_gram_gradient", z_RF.dtype, (grad_RF, z_RF, rows_TK, coefficients_TKK), (tokens, k, z_RF.shape[1]))


def largest(scores_TE: Tensor, ids_TK: Tensor) -> None:
    """`ids[t]`: the places of the k largest of `scores[t]`, the largest first; both contiguous, scores float32 or float64."""
    tokens, k = ids_TK.shape
    _call("largest", scores_TE.dtype, (scores_TE, ids_TK), (tokens, scores_TE.shape[1], k))


def squared_cosines(gram_TKK: Tensor, floor: float, values_T: Tensor, gradient_TKK: Tensor) -> None:
    """`gram.squared_cosines` and its gradient by every entry; all contiguous, of one type, float32 or float64."""
    tokens, k, _ = gram_TKK.shape
    _call("squared_cosines", gram_TKK.dtype, (gram_TKK, values_T, gradient_TKK), (tokens, k), ctypes.c_double(floor))


def responses(weight_JGD: Tensor, proxies_ED: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`answers[j, f, e] = <weight[j, f], proxies[e]>`, (J, width, E), for the first f, and `answers.square().sum(1).t()`.

    D must be a multiple of PANEL.
    """
    experts, rows, dim = weight_JGD.shape
    vectors = len(proxies_ED)
    whole = pad(proxies_ED, (0, 0, 0, -vectors % PANEL)) if vectors % PANEL else proxies_ED
    packed = whole.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    answers_JFE = proxies_ED.new_empty(experts, width, vectors)
    squares_JSE = proxies_ED.new_empty(experts, -(-width // STRIP), vectors)
    tensors = (weight_JGD, packed, answers_JFE, squares_JSE)
    _call("responses", weight_JGD.dtype, tensors, (experts, rows, width, dim, vectors))
    return answers_JFE, squares_JSE.sum(1).t()


def add_response_gradients(
    grad_JGD: Tensor, weight_JGD: Tensor, proxies_ED: Tensor, answers_JFE: Tensor, grad_EJ: Tensor, of_proxies: bool
) -> Tensor | None:
    """From the gradient of `answers.square().sum(1).t()`: adds the weight's to grad, returns the proxies' (E, D), if wanted."""
    experts, rows, dim = weight_JGD.shape
    vectors, width = len(proxies_ED), answers_JFE.shape[1]
    packed = proxies_ED.unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous()
    parts = packed.new_zeros(torch.get_num_threads(), *packed.shape) if of_proxies else None
    tensors = (grad_JGD, weight_JGD, packed, answers_JFE, grad_EJ.t().contiguous(), parts)
    _call("add_response_gradients", weight_JGD.dtype, tensors, (experts, rows, width, dim, vectors))
    return None if parts is None else parts.sum(0).transpose(0, 1).flatten(1)


def coupling_bounds(router_ED: Tensor) -> Tensor:
    """`losses.coupling_noise_bound`, of float32 or float64."""
    bounds_E = router_ED.new_empty(len(router_ED))
    _call("coupling_bounds", router_ED.dtype, (router_ED.contiguous(), bounds_E), tuple(router_ED.shape))
    return bounds_E


def excess_slopes(matrix_EE: Tensor, alpha: float) -> Tensor:
    """The gradient of `losses.coupling_excess`, of float32 or float64."""
    slopes_EE = torch.empty_like(matrix_EE, memory_format=torch.contiguous_format)
    tensors = (matrix_EE.contiguous(), slopes_EE)
    _call("excess_slopes", matrix_EE.dtype, tensors, (len(matrix_EE),), ctypes.c_double(alpha))
    return slopes_EE


def uniform(rows_B: Tensor, columns_S: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """`draws.keyed_uniform`, (B, S), with `start` the bits of its first parts; int64 in, float32 or float64 out."""
    values = torch.empty(len(rows_B), len(columns_S), dtype=dtype)
    sizes = (len(rows_B), len(columns_S), start)
    _call("uniform", dtype, (rows_B.contiguous(), columns_S.contiguous(), values), sizes)
    return values


def drawn(rows_B: Tensor, columns_S: Tensor, start: int, limit: int) -> Tensor:
    """Flat places, of (B, S), of the elements whose `draws.keyed_bits` from `start` on are below `limit`; all int64."""
    found = library()
    assert found is not None
    rows_B, columns_S = rows_B.contiguous(), columns_S.contiguous()
    height, width = len(rows_B), len(columns_S)
    places = torch.empty(height * width, dtype=torch.int64)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows_B, columns_S, places)]
    found.drawn.restype = ctypes.c_int64
    return places[: found.drawn(*pointers, *map(ctypes.c_int64, (height, width, start, limit)))]


def _call(
    name: str, dtype: torch.dtype, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], *numbers: ctypes.c_double
) -> None:
    found = library()
    assert found is not None
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous()
    function = getattr(found, f"{name}_{SUFFIX[dtype]}")
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    function(*pointers, *map(ctypes.c_int64, sizes), *numbers, ctypes.c_int(torch.get_num_threads()))


def _built() -> Path:
    """Path of the shared library, compiled now if this machine has none of this source yet."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc"))), None)
    if compiler is None:
        raise OSError("no C compiler (gcc or cc) on PATH")
    key = hashlib.sha256("\n".join((SOURCE.read_text(), compiler, *FLAGS, _processor())).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchtitan_ext"
    path = cache / f"kernels-{key}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # processes may build at once: the last rename wins
            fresh = Path(scratch) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
            if done.returncode:
                raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
            os.replace(fresh, path)
    return path


def _processor() -> str:
    """What -march=native depends on: the architecture and its extensions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
