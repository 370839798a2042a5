"""The losses in TorchTitan's MoE models, by one command line option and without a change of TorchTitan.

    --override.imports 'torchtitan_ext.adapters.torchtitan.losses={"sp": 2e-3, "cp": 1e-3}'

The override replaces three kinds of configuration by subclasses: of every MoE layer (`layers.py`), of the loss and of the
metrics (`training.py`). They share `record.RECORD`: layers write to it what the terms need of a forward pass, the loss reads it
and adds the weighted terms, the metrics log them. docs/torchtitan.md says what is exact and what is refused.

Written for TorchTitan 0.3.0.
"""

from typing import Any

from torchtitan.components.loss import BaseLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import Configurable
from torchtitan.config.override import derive, override
from torchtitan.models.common.moe import MoE

from torchtitan_ext.adapters.torchtitan.layers import recorded_layer
from torchtitan_ext.adapters.torchtitan.record import RECORD
from torchtitan_ext.adapters.torchtitan.training import LoggedTerms, LossWithTerms, subclass

__all__ = ["losses"]


class _OneOf(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, MoE.Config | BaseLoss.Config | MetricsProcessor.Config)


class _Targets(Configurable.Config, metaclass=_OneOf):
    """What the override replaces. An override has one target class, found with isinstance()."""


@override(target=_Targets, description="loss terms of torchtitan_ext")
def losses(config: Any, *, measure: list[str] | tuple[str, ...] = (), **terms: Any) -> Any:
    """Adds loss terms to every MoE layer, to the loss and to the logged metrics.

    terms: by name (lb, z, sp, cp, o, v) the weight, or a table of the term's options: `{"cp": {"weight": 1e-3, "source":
    "activated"}}`. measure: names of terms to log at weight 0 too. Raises ValueError, in one line, for what is unknown or
    cannot be exact.
    """
    if isinstance(config, MoE.Config):
        RECORD.configure(terms, measure)
        return recorded_layer(config)
    mixin = LossWithTerms if isinstance(config, BaseLoss.Config) else LoggedTerms
    return derive(config, subclass(mixin, type(config)))
