"""The dtype in which losses are computed."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half-precision inputs, float64 for float64: losses and reductions use at least float32."""
    return torch.promote_types(dtype, torch.float32)
