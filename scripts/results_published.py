"""The table of published figures beside ours: docs/evidence/published.toml and the numbers of two sweeps."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from results_sources import EVIDENCE, Source
from results_tables import table, written

from titan_moe.config.load import merge_file
from titan_moe.errors import UserError
from titan_moe.runtime.json_file import first_mistake

PUBLISHED = EVIDENCE / "published.toml"


class Figure(BaseModel):
    """A published figure of two sets of losses, and the measure of ours that corresponds to it."""

    model_config = ConfigDict(extra="forbid")

    what: str
    where: str
    size: str
    arms: Annotated[list[str], Field(min_length=2, max_length=2)]
    measure: str
    says: str = ""
    before: str = ""
    after: str = ""


def figures() -> list[Figure]:
    content: dict[str, Any] = {}
    merge_file(content, {}, PUBLISHED)
    try:
        return [Figure.model_validate(one) for one in content["figure"]]
    except (KeyError, ValidationError) as error:
        what = first_mistake(error) if isinstance(error, ValidationError) else "has no [[figure]]"
        raise UserError(f"{PUBLISHED}: {what}") from error


def published_table(sources: Mapping[str, Source], titles: Mapping[str, str]) -> str:
    """sources: by the name of the sweep. titles: of their columns."""
    body: list[Sequence[str]] = []
    for figure in figures():
        ours = [cell(source, figure) for source in sources.values()]
        body.append([figure.what, theirs(figure), f"{figure.where}: {figure.size}", *ours])
    return table(["what", "the paper", "where: size and tokens", *(titles[name] for name in sources)], body)


def theirs(figure: Figure) -> str:
    """The paper's two values, and for perplexities their logarithm's difference in nats."""
    if not figure.before:
        return figure.says
    text = f"{figure.before} to {figure.after}"
    if figure.measure != "perplexity":
        return text
    return f"{text}: {gain(figure):+.4f} nats"


def gain(figure: Figure) -> float:
    """The difference of the paper's losses in nats, from its perplexities."""
    before, after = (float(value.split()[0]) for value in (figure.before, figure.after))
    return math.log(after / before)


def cell(source: Source, figure: Figure) -> str:
    """Our two values and, where it is known, the paired difference with its interval."""
    first, second = figure.arms
    measure = "loss" if figure.measure == "perplexity" else figure.measure
    change = source.change(first, second, measure)
    means = [source.mean(arm, measure) for arm in figure.arms]
    if change is None and means[1] is None:
        return "not run"
    if figure.measure == "perplexity":
        means = [None if mean is None else math.exp(mean) for mean in means]
    text = " to ".join(f"{mean:.4g}" for mean in means if mean is not None) if None not in means else ""
    if change is None:
        return text
    if measure != "loss":
        return f"{text}: {written(change)}".removeprefix(": ")
    if change.pairs < 2:
        return f"{text}: {written(change)} nats"
    inside = "inside" if change.low <= gain(figure) <= change.high else "outside"
    return f"{text}: {written(change)} nats; the paper's is {inside}"
