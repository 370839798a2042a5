"""What Megatron-Core needs to run on a CPU: stand-ins for calls of torch.cuda, and process groups of gloo.

They change torch for the whole process: call them only in processes that `tests.helpers.ranks.launch` has started.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Stream:
    """Of torch.cuda: on a CPU there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, *_: Any) -> "Event":
        return Event()

    def synchronize(self) -> None: ...


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, *_: Any) -> None: ...


def install() -> None:
    """Replaces what Megatron-Core calls of torch.cuda, and what it misses without Transformer Engine."""
    cuda: Any = torch.cuda
    stream, zeros = Stream(), torch.zeros
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = lambda *_: stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.current_device = lambda: torch.device("cpu")
    cuda.manual_seed = lambda _: None
    cuda.synchronize = lambda *_: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    def zeros_here(*sizes: Any, device: Any = None, **options: Any) -> Any:
        return zeros(*sizes, device="cpu" if str(device).startswith("cuda") else device, **options)

    torch.zeros = zeros_here  # type: ignore[assignment]

    import megatron.core.tensor_parallel.random as random_state
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    random_state._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random_state._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    if not getattr(random_state, "HAVE_TE", True):  # `moe_act` asks Transformer Engine whether fp8 is on

        class NoFp8:
            is_fp8_enabled = staticmethod(lambda: False)
            get_fp8_recipe = staticmethod(lambda: None)

        random_state.FP8GlobalStateManager = NoFp8
        random_state.activation_recompute_forward = lambda **_: contextlib.nullcontext()
        random_state.fp8_autocast = lambda **_: contextlib.nullcontext()
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def to_cpu(x: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001 - Megatron's names
        """Megatron's turns only tensors on a GPU into NumPy arrays, and all-to-all takes no tensors as sizes."""
        return x.numpy() if torch.is_tensor(x) and as_numpy else x

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


class SequenceParallelNorm(nn.Module):
    """RMSNorm that may be used with sequence parallelism, which Megatron's own norm without Transformer Engine refuses."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class GroupedLinear(nn.Module):
    """In place of Transformer Engine's grouped linear layer, in PyTorch's operations."""

    def __init__(self, experts: int, width: int, out: int, *, init_method: Any, **_: Any) -> None:
        super().__init__()
        for expert in range(experts):
            weight = nn.Parameter(torch.empty(out, width))
            init_method(weight)
            weight.allreduce = False  # type: ignore[attr-defined]
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, x: torch.Tensor, tokens_per_expert: Any) -> tuple[torch.Tensor, None]:
        parts = x.split([int(count) for count in tokens_per_expert])
        return torch.cat([part @ getattr(self, f"weight{e}").t() for e, part in enumerate(parts)]), None
