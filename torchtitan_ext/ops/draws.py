"""Stateless random numbers: a function of a key alone, so the same on every rank and layout, and when recomputed.

A key is a sequence of integers and integer tensors that broadcast: (seed, purpose, step, layer, index ...). It is
hashed part by part with the 32-bit finaliser of MurmurHash3.
"""

import math
from typing import Any

import torch
from torch import Tensor

from torchtitan_ext.ops import select

MASK = 0xFFFFFFFF

# The purpose in a key, so that different uses have different numbers.
ERC_NOISE, SP_SAMPLE, SP_SIGNS, SP_SKETCH = range(1, 5)


def _mix(h: Any) -> Any:
    """The finaliser of the hash, for a Python integer or an int64 tensor."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def _hash_part(h: Any, part: Any) -> Any:
    """The hash of a key extended by one part."""
    return _mix((h * 0x9E3779B1 + (part & MASK) + 0x7F4A7C15) & MASK)


def keyed_bits(*key: Tensor | int, device: torch.device, start: Tensor | int = 0) -> Tensor:
    """32 random bits per element of the broadcast key, as int64 in [0, 2^32).

    start: the bits of a shorter key, which `key` extends. A key is cheapest with integers first and small tensors
    before large ones: intermediate hashes have the shape of the parts so far."""
    h: Any = start
    for part in key:
        # torch.compile makes integers that differ between layers symbolic, and types their products as floats.
        symbolic = torch.compiler.is_compiling() and not isinstance(part, Tensor)
        value = torch.full((), part, dtype=torch.int64, device=device) if symbolic else part  # type: ignore[arg-type]
        value = value.to(device=device, dtype=torch.int64) if isinstance(value, Tensor) else value
        h = _hash_part(h, value)
    return torch.as_tensor(h, dtype=torch.int64, device=device)


def keyed_uniform(
    *key: Tensor | int, rows_B: Tensor, columns_S: Tensor, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, (B, S).

    key: integers and scalar tensors, extended by the elements of rows_B (B,) and columns_S (S,), integers.
    """
    kernel = select.direct_kernel("uniform", rows_B.to(device))
    if kernel is not None:
        values: Tensor = kernel(rows_B, columns_S, folded(key), dtype)
        return values
    return (keyed_bits(*key, rows_B.unsqueeze(1), columns_S, device=device) >> 8).to(dtype) * 2.0**-24


def folded(key: tuple[Tensor | int, ...]) -> int:
    """The hash of a key of integers and scalar tensors, as a Python integer."""
    h = 0
    for part in key:
        h = _hash_part(h, int(part))
    return h


def keyed_signs(*key: Tensor | int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random signs +1 or -1, (*S, width) for a key that broadcasts to shape S."""
    return signs_of(keyed_bits(*key, device=device), width, dtype)


def signs_of(bits: Tensor, width: int, dtype: torch.dtype = torch.float32, first: int = 0) -> Tensor:
    """Random signs (..., width) from the bits of a key (...), 32 per hash: columns `first` to `first + width`."""
    words = torch.arange(first // 32, -(-(first + width) // 32), device=bits.device)
    hashes = keyed_bits(words, device=bits.device, start=bits.unsqueeze(-1))
    unpacked = (hashes.unsqueeze(-1) >> torch.arange(32, device=bits.device)) & 1
    return (2 * unpacked.flatten(-2)[..., first % 32 : first % 32 + width] - 1).to(dtype)


def sample(fraction: float, *key: Tensor | int, rows_B: Tensor, columns_S: Tensor, device: torch.device) -> Tensor:
    """Flat indices into (B, S) of a Bernoulli sample with probability `fraction`.

    key: integers and scalar tensors, extended by the elements of rows_B (B,) and columns_S (S,), integers. On the meta
    device the result has the expected number of elements."""
    if device.type == "meta":
        return torch.empty(round(fraction * len(rows_B) * len(columns_S)), dtype=torch.int64, device=device)
    limit = math.ceil(fraction * 2**32)
    kernel = select.direct_kernel("sample", rows_B.to(device))
    if kernel is not None:
        indices: Tensor = kernel(rows_B, columns_S, folded(key), limit)
        return indices
    bits_BS = keyed_bits(*key, rows_B.unsqueeze(1), columns_S, device=device)
    return (bits_BS.flatten() < limit).nonzero().squeeze(1)


def may_count(device: torch.device) -> bool:
    """Whether the number of drawn elements may be looked at: not on a GPU, where the host would wait, nor when compiling."""
    return device.type in ("cpu", "meta") and not torch.compiler.is_compiling()


def padded_sample(
    fraction: float, *key: Tensor | int, rows_B: Tensor, columns_S: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The same sample with a number of elements that does not depend on the draw: indices (N,), all different, and whether
    each belongs to the sample (N,) bool.

    For a GPU, where to find out how many elements were drawn makes the host wait, and for compilers. The sample has more than
    N elements, of which the last are then left out, with a probability below 1e-13."""
    count = len(rows_B) * len(columns_S)
    mean = fraction * count
    # Bernstein: P(more than mean + t) <= exp(-t^2 / (2 (mean + t / 3))), at most e^-32 for this t.
    size = min(count, math.ceil(mean + 8.0 * math.sqrt(mean) + 24.0))
    bits_BS = keyed_bits(*key, rows_B.unsqueeze(1), columns_S, device=device)
    drawn = bits_BS.flatten() < math.ceil(fraction * 2**32)
    others_first, order = drawn.logical_not().to(torch.uint8).sort(stable=True)
    return order[:size], others_first[:size] == 0


def distinct(keys_N: Tensor) -> tuple[Tensor, Tensor]:
    """Unique keys, and each element's index into them. On the meta device and in compiled graphs all count as different."""
    if keys_N.is_meta or torch.compiler.is_compiling():
        return keys_N, torch.arange(len(keys_N), device=keys_N.device)
    return keys_N.unique(return_inverse=True)
