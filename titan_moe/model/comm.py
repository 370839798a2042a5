"""Tensor-parallel communication points: this class is the single-rank no-op, parallel/tensor.py has the other.

The names follow Megatron's (`copy_to_tensor_model_parallel_region` and so on). B sequences, S tokens, s of them on this
rank, D model width.
"""

from torch import Tensor


class TPComm:
    """One rank has all heads, hidden units, vocabulary rows and tokens."""

    def copy_to_tp(self, x: Tensor) -> Tensor:
        """Identity before sharded columns of a product; the backward all-reduces the gradient."""
        return x

    def reduce_from_tp(self, x: Tensor) -> Tensor:
        """All-reduce (sum) of partial sums; the backward is the identity."""
        return x

    def gather_from_tp(self, x: Tensor) -> Tensor:
        """All-gather in the last dimension, (..., n) -> (..., ranks * n); the backward takes this rank's part."""
        return x

    def gather_sequence(self, x: Tensor) -> Tensor:
        """All-gather of tokens before a sharded product, (B, s, D) -> (B, S, D); the backward reduce-scatters."""
        return x

    def reduce_scatter_sequence(self, x: Tensor) -> Tensor:
        """Reduce-scatter of partial sums over tokens, (B, S, D) -> (B, s, D); the backward all-gathers."""
        return x

    def gather_sequence_replicated(self, x: Tensor) -> Tensor:
        """All-gather of tokens before a replicated product; the backward takes this rank's part of the gradient."""
        return x

    def divide_gradient(self, x: Tensor) -> Tensor:
        """Identity; the backward divides by the ranks. For replicated uses of what `gather_sequence` returns, whose
        backward adds up the ranks' equal gradients."""
        return x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, without a gradient."""
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Maximum over ranks, without a gradient."""
        return x

    def shard_offset(self, size: int) -> int:  # noqa: ARG002 - the interface
        """Index of this rank's first element in a dimension with `size` elements per rank."""
        return 0


SINGLE_RANK = TPComm()
