"""Sums over the forward passes of a step, from which `metrics()` is made."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_ext.carry import Carry
from torchtitan_ext.collectives import Group, all_sum
from torchtitan_ext.metrics import dead_fraction, max_vio


class StepSums(NamedTuple):
    """Weighted sums over tokens, without gradients: N terms, L MoE layers, M measures, E experts."""

    names: list[str]
    measures: tuple[str, ...]
    training: bool
    """Whether these are passes in training mode."""
    terms_LN: Tensor
    sums_LM: Tensor
    counts_LE: Tensor
    weight: Tensor
    """Sum of the token weights, ()."""

    def add(self, terms_LN: Tensor, carry: Carry, weight: Tensor) -> None:
        """Adds one forward pass."""
        self.terms_LN.add_(terms_LN)
        self.sums_LM.add_(carry.sums.detach())
        self.counts_LE.add_(carry.counts)
        self.weight.add_(weight)

    def metrics(self, per_layer: bool, group: Group | None) -> dict[str, float]:
        """As in `Attached.metrics`."""
        weight = all_sum(self.weight, group)
        # With num_items_in_batch the weights of a whole step sum to 1 already.
        scale = 1.0 / torch.where(weight > 0, weight, 1.0)
        terms_LN, sums_LM = all_sum(self.terms_LN, group) * scale, all_sum(self.sums_LM, group) * scale
        counts_LE = all_sum(self.counts_LE, group)
        columns = {f"reg/{name}": terms_LN[:, n] for n, name in enumerate(self.names)}
        columns |= {"moe/max_vio": max_vio(counts_LE), "moe/dead": dead_fraction(counts_LE)}
        columns |= {f"moe/{name}": sums_LM[:, m] for m, name in enumerate(self.measures)}
        by_layer = torch.stack([column.to(torch.float64) for column in columns.values()], 1).cpu()
        result = {
            name: float(column.sum() if name.startswith("reg/") else column.mean())
            for name, column in zip(columns, by_layer.t(), strict=True)
        }
        if per_layer:
            for layer, row in enumerate(by_layer.tolist()):
                result |= {f"layer-{layer}/{name}": value for name, value in zip(columns, row, strict=True)}
        return result


def empty_sums(names: list[str], measures: tuple[str, ...], training: bool, terms_LN: Tensor, carry: Carry) -> StepSums:
    """Sums of nothing, with shapes and dtypes as given."""
    zero = torch.zeros_like
    return StepSums(
        names, measures, training, zero(terms_LN), zero(carry.sums), zero(carry.counts), terms_LN.new_zeros(())
    )
