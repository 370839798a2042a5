"""Intervals that hold at every number of seeds, and what a sweep decides from them."""

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from titan_moe.analysis.sweep.sequential import EFFECT, anytime, decision, half_width, seeds_needed

MARGIN = 0.005
SPREAD = 0.0083  # standard deviation of nano_upcycled's paired differences, lb,sp to lb
SEEDS = 40


def bayes_factor(t: float, pairs: int) -> float:
    """Of Student's t for an effect size ~ N(0, EFFECT^2), by integrating noncentral t densities."""
    freedom = pairs - 1
    weighted, _ = integrate.quad(
        lambda d: stats.nct.pdf(t, freedom, d * pairs**0.5) * stats.norm.pdf(d, scale=EFFECT), -6, 6, limit=200
    )
    return float(weighted / stats.t.pdf(t, freedom))


@pytest.mark.parametrize(("pairs", "confidence"), [(5, 0.95), (10, 0.95), (10, 0.99), (25, 0.99)])
def test_the_interval_ends_where_the_bayes_factor_reaches_its_bound(pairs: int, confidence: float) -> None:
    """Against numerical integration of the definition."""
    t = half_width(pairs, 1.0, confidence) * pairs**0.5
    wanted = optimize.brentq(lambda x: bayes_factor(x, pairs) - 1 / (1 - confidence), 0.5, 60)
    assert t == pytest.approx(wanted, rel=1e-4)


def decided(differences: np.ndarray, confidence: float) -> str:
    """The first decision of someone who looks after every seed."""
    for pairs in range(2, len(differences) + 1):
        word = decision(anytime(differences[:pairs].tolist(), confidence), MARGIN)
        if word != "undecided":
            return word
    return "undecided"


@pytest.mark.parametrize(("difference", "wrong", "right"), [(0.0, ("lower", "higher"), 0.45), (0.01, ("lower",), 0.95)])
def test_false_alarms_and_power_over_1000_replays(difference: float, wrong: tuple[str, ...], right: float) -> None:
    """With the measured spread and a look after every seed up to 40. No difference: one is claimed in at most 5% of the
    replays (plus three standard errors of 1,000 replays). A difference of 0.01 nats: found in at least 95%."""
    source = np.random.default_rng(0)
    words = [decided(source.normal(difference, SPREAD, SEEDS), 0.95) for _ in range(1000)]
    alarms = sum(word in wrong for word in words) / 1000
    assert alarms <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    wanted = "higher" if difference else "no difference"
    assert sum(word == wanted for word in words) / 1000 >= right


def test_who_stops_at_a_t_interval_without_0_is_wrong_more_often() -> None:
    """The same replays with Student's interval: the reason for the other one."""
    source = np.random.default_rng(0)
    alarms = 0
    for _ in range(1000):
        values = source.normal(0.0, SPREAD, SEEDS)
        counts = np.arange(2, SEEDS + 1)
        means = values.cumsum()[1:] / counts
        deviations = np.array([values[:n].std(ddof=1) for n in counts])
        alarms += bool((np.abs(means) > stats.t.ppf(0.975, counts - 1) * deviations / counts**0.5).any())
    assert alarms / 1000 > 0.15


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([], "no pair"),
        ([0.1], "one seed"),
        ([0.1, 0.1], "higher"),
        ([-0.1, -0.1, -0.1], "lower"),
        ([0.0, 0.0], "no difference"),
        ([0.1, 0.2, 0.15], "undecided"),
        ([0.01, 0.011, 0.009, 0.01, 0.0105, 0.0095, 0.01, 0.01], "higher"),
    ],
)
def test_decisions(values: list[float], word: str) -> None:
    assert decision(anytime(values, 0.95), MARGIN) == word


def test_seeds_needed_is_the_least_number_that_reaches_the_margin() -> None:
    result = anytime(np.random.default_rng(1).normal(0, SPREAD, 6).tolist(), 0.99)
    more = seeds_needed(result, MARGIN, 0.99)
    assert more is not None
    assert half_width(6 + more, result.deviation, 0.99) <= MARGIN < half_width(5 + more, result.deviation, 0.99)
    assert seeds_needed(result, 1e-9, 0.99) is None
    assert seeds_needed(anytime([0.1], 0.99), MARGIN, 0.99) is None
    assert seeds_needed(result, 100.0, 0.99) == 0 or half_width(6, result.deviation, 0.99) > 100.0
