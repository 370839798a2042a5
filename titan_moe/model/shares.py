"""What a module does where tensor parallelism may cut: nothing on one rank (parallel/tensor.py has the other)."""

from torch import Tensor


class Shares:
    """All heads, hidden units and vocabulary are here."""

    def enter(self, x: Tensor) -> Tensor:
        """Before a product of which each rank computes some columns."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """After a product, or any sum, of which each rank has some of the summands."""
        return x

    def widen(self, x: Tensor) -> Tensor:
        """All columns, of which each rank has some: (..., n) -> (..., ranks * n)."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, outside autograd."""
        return x

    def highest(self, x: Tensor) -> Tensor:
        """The largest over ranks, outside autograd."""
        return x

    def first_row(self, rows: int) -> int:  # noqa: ARG002 - the interface
        """Where this rank's rows begin in a matrix that is cut into as many for each."""
        return 0


ALONE = Shares()
