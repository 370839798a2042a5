"""What the project wants to reach on a card, and what was measured of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Facts = Mapping[str, Any]


class Goal(NamedTuple):
    text: str
    wanted: str
    facts: tuple[str, ...]
    """Findings that are needed, all of them."""
    judge: Callable[[list[float]], bool]
    show: Callable[[list[float]], str]


def percent(values: list[float]) -> str:
    return ", ".join(f"{100 * value:.2f}%" for value in values)


def times(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


LAYERS = ("layer/small", "layer/medium", "layer/large")
GOALS = [
    Goal(
        "sp and cp together, part of a step",
        "at most 0.5% (H100)",
        ("sp and cp/eager", "sp and cp/compiled"),
        lambda values: min(values) <= 0.005,
        lambda values: f"{percent(values)} (eager, compiled)",
    ),
    Goal(
        "time of an MoE layer over TorchTitan's",
        "below 1 at small, medium, large",
        LAYERS,
        lambda values: max(values) < 1,
        times,
    ),
    Goal(
        "speed of a step over one with TorchTitan's parts",
        "at least 1.5",
        ("step/TorchTitan",),
        lambda v: v[0] >= 1.5,
        times,
    ),
    Goal("speed of a step over Transformers'", "at least 3", ("step/Transformers",), lambda v: v[0] >= 3, times),
    Goal(
        "host waits of an MoE layer that TorchTitan's does not have",
        "none",
        ("waits beyond TorchTitan's",),
        lambda values: values[0] <= 0,
        lambda values: f"{values[0]:g}",
    ),
]


def rows(facts: Facts, card: str) -> list[tuple[str, str, str, str]]:
    """Goal, what is wanted, what was measured, and whether it is reached. card: its name; empty: there is none."""
    found = []
    for goal in GOALS:
        values = [facts[name] for name in goal.facts if name in facts]
        if not card:
            measured, reached = "not measured: no card was at hand", ""
        elif len(values) < len(goal.facts):
            missing = ", ".join(name for name in goal.facts if name not in facts)
            measured, reached = f"not measured: no {missing}", ""
        else:
            measured, reached = goal.show(values), "yes" if goal.judge(values) else "no"
        found.append((goal.text, goal.wanted, measured, reached))
    return found
