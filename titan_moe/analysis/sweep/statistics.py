"""Paired comparisons over seeds: mean differences, their confidence intervals and tests, and Holm's correction."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Paired(NamedTuple):
    """Statistics of the differences B - A between two arms, paired by seed."""

    pairs: int
    mean: float
    low: float
    """Lower end of the 95% interval of the mean by Student's t; nan for fewer than two pairs."""
    high: float
    p: float
    """p-value of the two-sided t-test that the mean is 0."""
    p_equivalent: float
    """p-value of the two one-sided tests that the mean lies outside +- margin; small: the arms are equivalent."""


def paired(differences: Sequence[float], margin: float) -> Paired:
    """margin: the largest difference that counts as no difference."""
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    mean = float(values.mean()) if count else float("nan")
    if count < 2:
        return Paired(count, mean, *[float("nan")] * 4)
    error = float(values.std(ddof=1)) / count**0.5
    if error == 0.0:  # the same difference in every pair: the t statistic is undefined, the answer is certain
        return Paired(count, mean, mean, mean, float(mean == 0.0), float(abs(mean) >= margin))
    student = stats.t(count - 1)
    half = float(student.ppf(0.5 + CONFIDENCE / 2)) * error
    p = 2 * float(student.sf(abs(mean) / error))
    p_equivalent = max(float(student.sf((mean + margin) / error)), float(student.cdf((mean - margin) / error)))
    return Paired(count, mean, mean - half, mean + half, p, p_equivalent)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's method; nan stays nan and does not count."""
    known = [index for index, p in enumerate(p_values) if not np.isnan(p)]
    order = sorted(known, key=lambda index: p_values[index])
    adjusted, highest = [float("nan")] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
