"""Warnings about a run: gradient norms that jump, experts without tokens, routing that collapses."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence

from torch import Tensor


class Spikes:
    """Which updates to leave out because the gradient norm jumped. All ranks decide alike, since the norm is the same."""

    LONGEST, SHORTEST = 128, 16
    MOST_IN_A_ROW = 10
    """So many spikes in a row are a new level: the next one is no spike, and the history begins again with it."""

    def __init__(self, deviations: float, norms: Sequence[float] = (), in_a_row: int = 0) -> None:
        """deviations: a norm that many standard deviations above the mean of the recent ones is a spike; 0: none is.
        norms: of the latest steps. in_a_row: the spikes since then."""
        self.deviations, self.in_a_row = deviations, in_a_row
        self.norms = deque(norms, maxlen=self.LONGEST)
        self.new_level = False
        """Whether the latest norm ended a row of spikes that was too long."""

    def over(self, norm: float) -> bool:
        """Whether this norm is a spike; if not, it is added to the history."""
        spike = self.new_level = False
        if self.deviations and len(self.norms) >= self.SHORTEST:
            spike = norm > statistics.fmean(self.norms) + self.deviations * statistics.stdev(self.norms)
        if spike and self.in_a_row < self.MOST_IN_A_ROW:
            self.in_a_row += 1
            return True
        if spike:
            self.new_level = True
            self.norms.clear()
        self.in_a_row = 0
        self.norms.append(norm)
        return False


class RoutingWatch:
    """Reports, once per event, an expert without tokens or a layer whose routing has collapsed."""

    PATIENCE = 50
    """Consecutive steps that make an event."""
    COLLAPSED, RECOVERED = 0.9, 0.8
    """Fraction of a layer's assignments that its `top_k` busiest experts have; collapsed above, recovered below."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.top_k = top_k
        self.idle = [[0] * experts for _ in range(layers)]
        self.crowded = [0] * layers
        self.can_collapse = top_k < experts

    def look(self, counts_LE: Tensor) -> Iterator[str]:
        """A line for every event that is complete with this step. counts_LE: the step's assignments per layer and expert."""
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
