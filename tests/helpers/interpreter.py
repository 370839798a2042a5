"""Triton's interpreter for the tests of the kernels: on a CPU it computes what a GPU would, with numpy.

A function is interpreted or compiled for good when `@triton.jit` decorates it, Triton's own functions too. So this module
is imported before anything that imports triton, and takes the switch back for processes that tests start. With a GPU the
same tests run the compiled kernels.
"""

import importlib.util
import os
import sys
from typing import Any

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED or not HAS_TRITON else "cuda"
REASON = (
    "the package triton is not installed" if not HAS_TRITON else "triton was imported before its interpreter was chosen"
)

if INTERPRETED and "triton" not in sys.modules:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.experimental.gluon  # noqa: F401 - imported at the first launch otherwise

        import torchtitan_ext.kernels.combine
        import torchtitan_ext.kernels.cross_entropy
        import torchtitan_ext.kernels.rotary
        import torchtitan_ext.kernels.router
        import torchtitan_ext.kernels.swiglu  # noqa: F401
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def available() -> bool:
    """Whether the kernels can run in this process."""
    if not INTERPRETED:
        return HAS_TRITON
    from triton.runtime.interpreter import InterpretedFunction

    from torchtitan_ext.kernels import swiglu

    return isinstance(swiglu.forward_kernel, InterpretedFunction)


def exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter compute with bfloat16 as a GPU does.

    It keeps bfloat16 as uint16: it truncates where a GPU rounds, reads subnormal numbers as others, and `tl.dot` multiplies
    the bits as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            values = np.ascontiguousarray(values).view(np.float32)
            return torch.from_numpy(values.reshape(-1)).bfloat16().view(torch.uint16).numpy().reshape(values.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(values).view(np.uint32)
        return convert(values, source, target, rounding)

    def widened(values: Any) -> Any:
        return (values.astype(np.uint32) << 16).view(np.float32)

    def exact_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        wide = [
            interpreter.TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        ]
        return dot(self, *wide, total, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", exact_dot)
