"""Intervals of a mean that may be looked at after every seed.

A 95% interval by Student's t covers the true mean with probability 0.95 at one number of seeds that was fixed before. Who
looks after every seed and stops when the interval excludes 0 is wrong more often. The intervals here hold at all numbers of
seeds at once: the probability that one of them ever misses the true mean is at most 1 - confidence, whenever one looks or
stops.

Definition: the Bayes factor of Student's t test against an effect size mean / standard deviation ~ N(0, EFFECT^2), with the
improper prior 1 / sigma on the standard deviation (Gönen, Johnson, Lu, Westfall 2005, The American Statistician 59), as
function of the assumed mean. Under that mean it is a test martingale of normally distributed differences (Hendriksen, de
Heide, Grünwald 2021, Bayesian Analysis 16; the confidence sequence: Wang and Ramdas 2025, Sequential Analysis 44, after Lai
1976). The interval is the set of means whose Bayes factor is below 1 / (1 - confidence).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EFFECT = 1.0
"""Standard deviation of the prior of mean / standard deviation. Other values change the width, not the coverage."""
MOST_SEEDS = 10_000
FINAL = ("lower", "higher", "no difference")
"""Decisions after which no more seeds are needed."""


class Anytime(NamedTuple):
    """A mean difference and its interval, which holds at every number of pairs at once."""

    pairs: int
    mean: float
    low: float
    high: float
    deviation: float
    """Standard deviation of a difference; nan for fewer than two pairs."""


def half_width(pairs: int, deviation: float, confidence: float) -> float:
    """Half the interval's width; infinite where no finite mean can be excluded yet."""
    if pairs < 2:
        return float("inf")
    freedom, spread = pairs - 1, 1 + pairs * EFFECT**2
    bound = (spread**0.5 / (1 - confidence)) ** (2 / pairs)
    # Solves (1 + x)^(pairs / 2) (1 + x / spread)^(-pairs / 2) = sqrt(spread) / (1 - confidence) for x = t^2 / freedom.
    if bound >= spread:
        return float("inf")
    return float((freedom * (bound - 1) / (1 - bound / spread)) ** 0.5 * deviation / pairs**0.5)


def anytime(differences: Sequence[float], confidence: float) -> Anytime:
    """The interval of the mean of paired differences, in the order in which they became known."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        mean = float(values.mean()) if len(values) else float("nan")
        return Anytime(len(values), mean, float("-inf"), float("inf"), float("nan"))
    equal = values.min() == values.max()  # runs that compute the same: certain, but no t statistic
    mean, deviation = float(values.mean()), 0.0 if equal else float(values.std(ddof=1))
    half = 0.0 if equal else half_width(len(values), deviation, confidence)
    return Anytime(len(values), mean, mean - half, mean + half, deviation)


def decision(result: Anytime, margin: float) -> str:
    """What the interval says: "lower", "higher", "no difference" (all of it within +- margin), "one seed", or "undecided".

    It is final: with the interval's confidence no later interval contradicts it."""
    if result.pairs < 2:
        return "one seed" if result.pairs else "no pair"
    if result.high < 0:
        return "lower"
    if result.low > 0:
        return "higher"
    return "no difference" if -margin <= result.low and result.high <= margin else "undecided"


def seeds_needed(result: Anytime, margin: float, confidence: float) -> int | None:
    """How many more pairs make half the width at most `margin`, if the differences go on to spread as they do; None before
    the second pair and beyond MOST_SEEDS."""
    if result.pairs < 2:
        return None
    low, high = result.pairs, MOST_SEEDS
    if half_width(high, result.deviation, confidence) > margin:
        return None
    while low < high:  # the width falls with the number of pairs
        middle = (low + high) // 2
        low, high = (low, middle) if half_width(middle, result.deviation, confidence) <= margin else (middle + 1, high)
    return low - result.pairs
