"""Counts where a GPU would make the host wait: reads of tensors, shapes that depend on data, tensors made from Python lists.

It runs on a CPU, where these are the same calls; `tolist` in a backward pass is not seen. Reads on a CPU's own paths
(kernels in C, products expert by expert) don't count: `gpu_paths` takes the branches that a GPU takes.
"""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_ext.ops import draws, select

READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"}
MAKERS = {"tensor", "as_tensor", "new_tensor"}
SHAPED_BY_DATA = {
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::masked_select",
    "aten::_local_scalar_dense",
}
CPU_ONLY = {"_groups"}
"""Functions of the CPU's grouped product."""


def gpu_paths(patch: pytest.MonkeyPatch) -> None:
    """No kernels in C, and draws of a fixed size."""
    patch.setattr(select, "KERNELS", ())
    patch.setattr(draws, "may_count", lambda _: False)


class HostReads(TorchFunctionMode):
    """A context; `seen` counts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.operations = _Operations(self.seen)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in READS and sys._getframe(1).f_code.co_name not in CPU_ONLY:
            self.seen[name] += 1
        data = args[1:2] if name == "new_tensor" else args[:1]
        if name in MAKERS and data and not isinstance(data[0], Tensor):
            self.seen[name] += 1
        return function(*args, **kwargs)

    def __enter__(self) -> "HostReads":
        super().__enter__()
        self.operations.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.operations.__exit__(*error)
        super().__exit__(*error)


class _Operations(TorchDispatchMode):
    """The same below autograd, so in backward passes too."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name().partition(".")[0]
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        unsized = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name in SHAPED_BY_DATA or by_mask or unsized:
            self.seen[name] += 1
        return function(*args, **kwargs)
