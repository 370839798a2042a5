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

    def gather(self, x: Tensor) -> Tensor:
        """All tokens of the sequences, of which each rank has a part, before partial products: (B, s, D) -> (B, S, D)."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's part of the tokens, from every rank's partial products: (B, S, D) -> (B, s, D)."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """All tokens, before what every rank computes alike with a gradient that is already whole: (B, s, D) -> (B, S, D)."""
        return x

    def alike(self, x: Tensor) -> Tensor:
        """x after `gather`, for what every rank computes alike."""
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
