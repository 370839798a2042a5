"""A tensor of a file, and the part of one of our tensors that it holds: the conversion in both directions.

entry.to_file(tensors)              the file's tensor, from our state_dict
entry.into_ours(value, tensors)     writes the file's tensor into our state_dict
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What is done to the values on the way between our tensor and the file. This one does nothing."""

    def to_file(self, value: Tensor) -> Tensor:
        return value

    def from_file(self, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True)
class Scaled(Change):
    """The file has `factor` times our values. Undone without rounding only where the factor is a power of two."""

    factor: float

    def to_file(self, value: Tensor) -> Tensor:
        return value * self.factor

    def from_file(self, value: Tensor) -> Tensor:
        return value / self.factor


@dataclass(frozen=True)
class InterleavedRotary(Change):
    """Rows of q or k for a rotary embedding of the pairs (2j, 2j + 1) of a head, where ours has the pairs (j, j + d/2).

    Weights (heads * d, D) and biases (heads * d,)."""

    heads: int

    def to_file(self, value: Tensor) -> Tensor:
        rows = value.unflatten(0, (self.heads, 2, -1))
        return rows.transpose(1, 2).reshape(value.shape)

    def from_file(self, value: Tensor) -> Tensor:
        rows = value.unflatten(0, (self.heads, -1, 2))
        return rows.transpose(1, 2).reshape(value.shape)


SAME = Change()


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    """In the file."""
    shape: tuple[int, ...]
    """In the file."""
    ours: str = ""
    """Our tensor, by its name in the model's state_dict; empty: a constant that our model does not have."""
    index: tuple[int | slice, ...] = ()
    """The part of our tensor: its first indices, such as the expert, then 0 for gate and 1 for up."""
    change: Change = SAME
    value: float = 0.0
    """Every number of a constant."""
    float32: bool = False
    """Kept in float32 whatever type the other tensors have: Transformers loads it so."""

    def to_file(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The file's tensor, in the type of ours. tensors: our state_dict, or the part of it with `ours`."""
        if not self.ours:
            return torch.full(self.shape, self.value)
        return self.change.to_file(tensors[self.ours][self.index]).reshape(self.shape)

    def into_ours(self, value: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Writes the file's tensor into our state_dict, in place. Only for entries with `ours`."""
        part = tensors[self.ours][self.index]
        part.copy_(self.change.from_file(value).reshape(part.shape))
