"""What cp takes from one MoE layer to the next one of the same forward pass."""

from typing import Any

from torch import Tensor

from torchtitan_ext.adapters.megatron.refusals import moe_layer_numbers


class Neighbours:
    """The MoE layers that were built from one spec: those of a model, or of a model's part on this pipeline stage."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        """Megatron's numbers of these layers, 1 is the model's first."""
        self._left: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Neighbours":
        """Itself: the layers of a copied spec or model are neighbours like those of the original."""
        return self

    def add(self, number: int) -> None:
        self.numbers.add(number)

    def is_first(self, number: int, config: Any) -> bool:
        """Whether a layer is the first MoE layer of the whole model. Raises ValueError if this rank can't know."""
        if config.pipeline_model_parallel_size == 1:
            return number == min(self.numbers)
        expected = moe_layer_numbers(config)
        here = {one for one in expected if min(self.numbers) <= one <= max(self.numbers)}
        if here != self.numbers:
            raise ValueError(
                f"the MoE layers of this pipeline stage are {sorted(self.numbers)}, and moe_layer_freq says {sorted(here)}"
            )
        return number == expected[0]

    def is_last(self, number: int) -> bool:
        return number == max(self.numbers)

    def leave(self, number: int, x: Tensor) -> None:
        """Keeps a tensor of layer `number` for the layer after it."""
        self._left[number] = x

    def take(self, number: int) -> Tensor:
        """What the MoE layer before layer `number` has left. It is kept no longer, so that memory is not held."""
        return self._left.pop(max(one for one in self.numbers if one < number))
