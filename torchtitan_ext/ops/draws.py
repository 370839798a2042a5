"""Random numbers that depend on their key alone: the same on every rank, layout, micro-batch split and recomputation.

A key is a handful of integers, or integer tensors that broadcast: (seed, purpose, step, layer, index ...). The hash is
MurmurHash3's 32-bit finaliser, folded over the key; there is no state.
"""

import math
from typing import Any

import torch
from torch import Tensor

from torchtitan_ext.ops import native

MASK = 0xFFFFFFFF

# What a draw is for, so that no two share their numbers.
ERC_NOISE, SP_SAMPLE, SP_SIGNS, SP_SKETCH = range(1, 5)


def _finalise(h: Any) -> Any:
    """The hash's last mixing, of a Python integer or of an int64 tensor."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def _fold(h: Any, part: Any) -> Any:
    """The hash of a key with one more part."""
    return _finalise((h * 0x9E3779B1 + (part & MASK) + 0x7F4A7C15) & MASK)


def keyed_bits(*key: Tensor | int, device: torch.device, start: Tensor | int = 0) -> Tensor:
    """32 random bits per element of the broadcast key, as int64 in [0, 2^32).

    start: the bits of a key that this one goes on from. Integers first and small tensors before large ones cost least: what is
    folded so far has the shape of the parts so far.
    """
    h: Any = start
    for part in key:
        # The compiler makes symbols of integers that differ between layers, and mistakes their products for floats.
        number = torch.compiler.is_compiling() and not isinstance(part, Tensor)
        value = torch.full((), part, dtype=torch.int64, device=device) if number else part  # type: ignore[arg-type]
        value = value.to(device=device, dtype=torch.int64) if isinstance(value, Tensor) else value
        h = _fold(h, value)
    return torch.as_tensor(h, dtype=torch.int64, device=device)


def keyed_uniform(
    *key: Tensor | int, rows_B: Tensor, columns_S: Tensor, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, (B, S).

    key: integers and scalar tensors; a row's number and a column's go on from there.
    """
    if by_kernel(device):
        return native.uniform(rows_B, columns_S, folded(key), dtype)
    return (keyed_bits(*key, rows_B.unsqueeze(1), columns_S, device=device) >> 8).to(dtype) * 2.0**-24


def by_kernel(device: torch.device) -> bool:
    """Whether a draw may be made in C."""
    return device.type == "cpu" and not torch.compiler.is_compiling() and native.library() is not None


def folded(key: tuple[Tensor | int, ...]) -> int:
    """The bits of a key of integers and scalar tensors."""
    h = 0
    for part in key:
        h = _fold(h, int(part))
    return h


def keyed_signs(*key: Tensor | int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """+1 or -1: the shape of the broadcast key, and a last dimension of `width`."""
    return signs_of(keyed_bits(*key, device=device), width, dtype)


def signs_of(bits: Tensor, width: int, dtype: torch.dtype = torch.float32, first: int = 0) -> Tensor:
    """+1 or -1 from the bits of a key (...): columns `first` to `first + width` (..., width). One hash gives 32 signs."""
    words = torch.arange(first // 32, -(-(first + width) // 32), device=bits.device)
    hashed = keyed_bits(words, device=bits.device, start=bits.unsqueeze(-1))
    unpacked = (hashed.unsqueeze(-1) >> torch.arange(32, device=bits.device)) & 1
    return (2 * unpacked.flatten(-2)[..., first % 32 : first % 32 + width] - 1).to(dtype)


def drawn(share: float, *key: Tensor | int, rows_B: Tensor, columns_S: Tensor, device: torch.device) -> Tensor:
    """Flat places of the elements of (B, S) that are drawn, each with probability `share`.

    key: integers and scalar tensors; a row's number and a column's go on from there. On the meta device as many as expected.
    """
    if device.type == "meta":
        return torch.empty(round(share * len(rows_B) * len(columns_S)), dtype=torch.int64, device=device)
    limit = math.ceil(share * 2**32)
    if by_kernel(device):
        return native.drawn(rows_B, columns_S, folded(key), limit)
    bits_BS = keyed_bits(*key, rows_B.unsqueeze(1), columns_S, device=device)
    return (bits_BS.flatten() < limit).nonzero().squeeze(1)


def distinct(keys_N: Tensor) -> tuple[Tensor, Tensor]:
    """The different keys, and each element's place among them; on the meta device as if all differed."""
    if keys_N.is_meta:
        return keys_N, torch.empty_like(keys_N)
    return keys_N.unique(return_inverse=True)
