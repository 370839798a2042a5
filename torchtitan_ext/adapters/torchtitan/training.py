"""The loss with the terms added, and the metrics with the terms logged: subclasses of those of a configuration."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX

from torchtitan_ext.adapters.torchtitan.record import NAME, RECORD
from torchtitan_ext.collectives import Ranks


def subclass(mixin: Any, config: Any) -> Any:
    """The configuration class of a class that extends the owner of `config` by a mixin."""
    return _subclass(mixin, config)


@functools.cache
def _subclass(mixin: Any, config: Any) -> Any:
    owner, name = config._owner, f"{mixin.__name__}{config._owner.__name__}"
    fields = {"__module__": mixin.__module__, "__qualname__": f"{name}.Config"}
    made: Any = dataclasses.dataclass(kw_only=True, slots=True)(type("Config", (config,), fields))
    type(name, (mixin, owner), {"Config": made, "__module__": mixin.__module__})
    return made


class LossWithTerms:
    """Adds the weighted terms to a loss in training. Validation, which computes no gradients, is unchanged."""

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().__call__(pred, labels, global_valid_tokens, **rest)  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return loss, metrics
        weights = (labels != IGNORE_INDEX).float()
        if global_valid_tokens is not None:
            weights = weights / global_valid_tokens
        return loss + RECORD.objective(labels, weights, loss), metrics


class LoggedTerms:
    """Logs terms and measures beside TorchTitan's metrics, and refuses layouts where the terms would not be exact."""

    def __init__(
        self, config: Any, *, parallel_dims: Any, config_dict: dict[str, Any] | None = None, **rest: Any
    ) -> None:
        refuse(parallel_dims, config_dict or {})
        super().__init__(config, parallel_dims=parallel_dims, config_dict=config_dict, **rest)  # type: ignore[call-arg]
        mesh = parallel_dims.get_optional_mesh("loss")
        RECORD.ranks = Ranks(data=mesh.get_group() if mesh is not None else None)

    def should_log(self, step: int) -> bool:
        # The Trainer asks this once, at the start of a step.
        RECORD.begin(step)
        answer: bool = super().should_log(step)  # type: ignore[misc]
        return answer

    def log(self, step: int, *values: Any, extra_metrics: dict[str, Any] | None = None, **rest: Any) -> None:
        metrics = {**(extra_metrics or {}), **RECORD.metrics()}
        super().log(step, *values, extra_metrics=metrics, **rest)  # type: ignore[misc]


def refuse(parallel_dims: Any, config: dict[str, Any]) -> None:
    """Raises ValueError for a layout in which the terms would not be exact, or have not been tested."""
    if parallel_dims.pp > 1:
        raise ValueError(
            f"{NAME}: parallelism.pipeline_parallel_degree = {parallel_dims.pp}: only the last stage calls the loss, so the "
            "terms of other stages' layers cannot be added; set it to 1"
        )
    if parallel_dims.tp > 1:
        raise ValueError(
            f"{NAME}: parallelism.tensor_parallel_degree = {parallel_dims.tp}: experts or tokens of a layer are split in a "
            "way that the terms do not know; set it to 1"
        )
    if parallel_dims.cp > 1:
        raise ValueError(
            f"{NAME}: parallelism.context_parallel_degree = {parallel_dims.cp}: the terms have not been tried on parts of "
            "sequences; set it to 1"
        )
    if parallel_dims.spmd_backend == "full_dtensor":
        raise ValueError(f"{NAME}: parallelism.spmd_backend = 'full_dtensor' is not supported; use 'spmd_types'")
    if config and not config["training"]["disable_cuda_graphs"]:
        raise ValueError(f"{NAME}: the terms have not been tried in CUDA graphs; pass --training.disable_cuda_graphs")
    compiled = config.get("compile", {})
    if compiled.get("enable") and "model" in compiled["components"] and config["activation_checkpoint"] is not None:
        raise ValueError(
            f"{NAME}: compile.components has 'model' together with activation checkpointing: a compiled recomputation "
            "cannot hand tensors out; switch one of them off"
        )
