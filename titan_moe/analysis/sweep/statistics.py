"""Paired comparisons over seeds: means of differences with their uncertainty, corrected for their number."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Paired(NamedTuple):
    """Differences of pairs (the same seed in two arms): B - A."""

    pairs: int
    mean: float
    low: float
    """Lower end of the 95% interval of the mean by Student's t; nan for fewer than two pairs."""
    high: float
    p: float
    """Two-sided, of the mean being 0."""
    p_equivalent: float
    """Of the mean lying outside +- the margin (two one-sided tests); small: the arms are equivalent."""


def paired(differences: Sequence[float], margin: float) -> Paired:
    """margin: what counts as no difference."""
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    mean = float(values.mean()) if count else float("nan")
    if count < 2:
        return Paired(count, mean, *[float("nan")] * 4)
    error = float(values.std(ddof=1)) / count**0.5
    if error == 0.0:  # the same in every pair: no test is needed
        return Paired(count, mean, mean, mean, float(mean == 0.0), float(abs(mean) >= margin))
    student = stats.t(count - 1)
    half = float(student.ppf(0.5 + CONFIDENCE / 2)) * error
    p = 2 * float(student.sf(abs(mean) / error))
    p_equivalent = max(float(student.sf((mean + margin) / error)), float(student.cdf((mean - margin) / error)))
    return Paired(count, mean, mean - half, mean + half, p, p_equivalent)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, nan where there is none."""
    known = [index for index, p in enumerate(p_values) if not np.isnan(p)]
    order = sorted(known, key=lambda index: p_values[index])
    adjusted, highest = [float("nan")] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted
