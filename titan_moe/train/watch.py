"""What a person would look out for: gradients that jump, experts that die, routing that collapses."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence

from torch import Tensor


class Spikes:
    """Which steps to leave out because their gradient jumped. The same on every rank, as the norm is."""

    LONGEST, SHORTEST = 128, 16

    def __init__(self, deviations: float, norms: Sequence[float] = ()) -> None:
        """deviations: how many standard deviations above the mean of the recent norms are too many; 0: none ever is. norms:
        of the latest steps."""
        self.deviations = deviations
        self.norms = deque(norms, maxlen=self.LONGEST)

    def over(self, norm: float) -> bool:
        """Whether this norm is a spike; otherwise it joins the history."""
        if self.deviations and len(self.norms) >= self.SHORTEST:
            limit = statistics.fmean(self.norms) + self.deviations * statistics.stdev(self.norms)
            if norm > limit:
                return True
        self.norms.append(norm)
        return False


class RoutingWatch:
    """Says once per event that an expert is dead or that a layer's routing has collapsed."""

    PATIENCE = 50
    """Steps in a row before it is an event."""
    COLLAPSED, RECOVERED = 0.9, 0.8
    """Share of a layer's assignments that its `top_k` busiest experts have."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.top_k = top_k
        self.idle = [[0] * experts for _ in range(layers)]
        self.crowded = [0] * layers
        self.can_collapse = top_k < experts

    def look(self, counts_LE: Tensor) -> Iterator[str]:
        """A line for every event that this step completes. counts_LE: its assignments."""
        for layer, counts in enumerate(counts_LE.tolist()):
            for expert, count in enumerate(counts):
                self.idle[layer][expert] = 0 if count else self.idle[layer][expert] + 1
            dead = [expert for expert, steps in enumerate(self.idle[layer]) if steps == self.PATIENCE]
            if dead:
                names = f"expert{'s' if len(dead) > 1 else ''} {', '.join(map(str, dead))}"
                yield f"MoE layer {layer}: {names} without a token for {self.PATIENCE} steps"
            if self.can_collapse:
                yield from self.look_for_collapse(layer, counts)

    def look_for_collapse(self, layer: int, counts: list[int]) -> Iterator[str]:
        share = sum(sorted(counts)[-self.top_k :]) / max(1, sum(counts))
        if share >= self.COLLAPSED:
            self.crowded[layer] = min(self.crowded[layer] + 1, self.PATIENCE + 1)
        elif share < self.RECOVERED or self.crowded[layer] < self.PATIENCE:
            self.crowded[layer] = 0
        if self.crowded[layer] == self.PATIENCE:
            percent = math.floor(100 * share)
            yield f"MoE layer {layer}: routing has collapsed: {self.top_k} experts have {percent}% of the tokens"
