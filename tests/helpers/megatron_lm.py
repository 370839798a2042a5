"""Runs the entry script, and so Megatron-LM's training loop, on a CPU: python -m tests.helpers.megatron_lm ARGUMENTS.

A checkout of Megatron-LM must be on the import path, before an installed megatron-core.
"""

import collections
import contextlib
import typing
import warnings
from typing import Any

import torch
import typing_extensions
from torch.overrides import TorchFunctionMode

from tests.helpers import megatron_cpu


class OnCpu(TorchFunctionMode):
    """Makes tensors on the CPU where Megatron-LM asks for a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or "cuda" in str(device)):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.to:
            args = tuple("cpu" if isinstance(one, str | torch.device) and "cuda" in str(one) else one for one in args)
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)


class Card:
    """Of torch.cuda.get_device_properties."""

    name, major, minor, total_memory, multi_processor_count = "none", 9, 0, 1 << 34, 1


def pretend_there_is_a_gpu() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.set_device = lambda *_: None
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: Card
    cuda.get_device_name = lambda *_: Card.name
    cuda.memory_stats = lambda *_, **__: collections.defaultdict(int)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("Int", "Long", "Float", "Double", "Half", "BFloat16"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


def main() -> None:
    warnings.filterwarnings("ignore")
    if not hasattr(typing, "override"):  # Megatron-LM 0.19 needs Python 3.12 for this alone
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    megatron_cpu.install()
    torch.compiler.set_stance("force_eager")
    # Before there seems to be a GPU, since importing asks for one.
    import megatron.core.datasets.utils as datasets
    import pretrain_gpt  # noqa: F401

    from torchtitan_ext.adapters.megatron import pretrain

    datasets.compile_helpers = lambda: None  # the installed package has them compiled
    with contextlib.suppress(ImportError):  # CUDA code, up to 0.16
        import megatron.legacy.fused_kernels as fused_kernels

        fused_kernels.load = lambda _: None
    init = torch.distributed.init_process_group

    def without_device(*args: Any, device_id: Any = None, **words: Any) -> None:  # noqa: ARG001 - gloo has none
        init(*args, **words)

    torch.distributed.init_process_group = without_device
    pretend_there_is_a_gpu()
    with OnCpu():
        pretrain.main()


if __name__ == "__main__":
    main()
