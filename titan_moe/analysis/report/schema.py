"""What a report reads of a run's config.toml and of the results of `titan-moe inspect`, which may be anyone's."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from titan_moe.checkpoint.state import Finite, Natural
from titan_moe.config.tables import Model

WITH_CHANCE = ("overlap", "overlap_y", "knn_overlap", "kappa")
"""Measures that a chance level is drawn for."""
MOST_EXPERTS = 1 << 14

Loads = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 53)]], Field(min_length=1, max_length=MOST_EXPERTS)]


class _Job(BaseModel):
    seed: int = 0


class _Weighted(BaseModel):
    weight: Finite = 0.0


class _Rate(BaseModel):
    rate: Finite = 0.0


class _Text(BaseModel):
    corpus: str | list[str] = "stdlib"


class _Steps(BaseModel):
    steps: int


class _Adapters(BaseModel):
    rank: Natural = 0


class RunConfig(BaseModel):
    """What a report shows of a run's config.toml. Terms that a module registered are in it too."""

    job: _Job = _Job()
    model: Model
    base: str = ""
    """The model that `titan-moe finetune` started from; empty for a run of `titan-moe train`."""
    lora: _Adapters = _Adapters()
    regularizers: dict[str, Any] = {}
    balancer: _Rate = _Rate()
    data: _Text = _Text()
    training: _Steps

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the terms that have one."""
        tables = {
            name: table for name, table in self.regularizers.items() if isinstance(table, dict) and "weight" in table
        }
        custom = self.regularizers.get("custom", {})
        tables |= {name: {"weight": weight} for name, weight in custom.items()} if isinstance(custom, dict) else {}
        return {name: _Weighted.model_validate(table).weight for name, table in tables.items()}

    @model_validator(mode="before")
    @classmethod
    def _of_finetuning(cls, values: Any) -> Any:
        """The table [model] of `titan-moe finetune` names a model; its shape is in that model's own files."""
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict) or "path" not in model:
            return values
        data = values.get("data")
        files = data.get("train") if isinstance(data, dict) else None
        rest = {key: value for key, value in values.items() if key not in ("model", "data", "base")}
        return rest | {"model": {}, "base": model["path"], "data": {} if files is None else {"corpus": files}}

    @model_validator(mode="after")
    def _weights_are_numbers(self) -> "RunConfig":
        self.weights  # noqa: B018 - raises for what is no number
        return self


class _Measures(BaseModel):
    """Measures of a layer or a pair of layers: the fields below, and any number of finite numbers."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _complete(self) -> "_Measures":
        extra = self.model_extra or {}
        names = {*type(self).model_fields, *extra}
        for name, value in extra.items():
            if isinstance(value, bool | str | dict) or (isinstance(value, int | float) and not abs(value) < 1e300):
                raise ValueError(f"{name} is not a finite number")
        for name in WITH_CHANCE:
            if name in names and f"{name}_chance" not in names:
                raise ValueError(f"{name}_chance is missing")
            if not isinstance(getattr(self, name, 0.0), int | float):
                raise ValueError(f"{name} is not a number")
        return self


class _Layer(_Measures):
    load: Loads
    domain_load: list[Loads]
    domain_information: Finite
    erc_M: list[list[Finite]]
    examples: list[list[tuple[str, str]]] = []


class _Pair(_Measures):
    kappa: Finite
    kappa_chance: Finite
    matching: list[Natural]
    cond: list[list[Finite]]


class Inspection(BaseModel):
    """A result of `titan-moe inspect`."""

    model_config = ConfigDict(extra="allow")

    step: Natural
    domains: list[str]
    summary: dict[str, Finite]
    layers: Annotated[list[_Layer], Field(min_length=1)]
    pairs: list[_Pair]

    @model_validator(mode="after")
    def _of_one_model(self) -> "Inspection":
        experts = len(self.layers[0].load)
        for layer in self.layers:
            lengths = {len(layer.load), *map(len, layer.domain_load), *map(len, layer.erc_M)}
            if lengths != {experts} or len(layer.erc_M) != experts:
                raise ValueError(f"layers differ in their {experts} experts")
            if len(layer.domain_load) != len(self.domains):
                raise ValueError("domain_load has not a row for every domain")
        for pair in self.pairs:
            if sorted(pair.matching) != [*range(experts)] or [len(row) for row in pair.cond] != [experts] * experts:
                raise ValueError(f"pairs differ in their {experts} experts")
        if len(self.pairs) != len(self.layers) - 1:
            raise ValueError("there is not a pair for every two layers")
        return self
