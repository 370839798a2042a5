"""Values for Megatron's log. Its tracker sums them over micro-batches; its training loop logs only names that it knows."""

# mypy: disable-error-code="import-untyped,import-not-found"

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor

from torchtitan_ext.collectives import Group


def record(name: str, value: Tensor, layer_number: int, num_layers: int, average: Group) -> None:
    """Adds a value of a layer to Megatron's tracker, to be averaged over a group of ranks when it is logged."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:  # before version 0.18
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(name, value, layer_number, num_layers, avg_group=average)
    else:
        get_moe_metrics_tracker().record(name, value, layer_number, num_layers, avg_group=average)


def log_names(config: Any) -> list[str]:
    """The names under which the enabled terms are recorded."""
    from torchtitan_ext.adapters.megatron.configuration import term_options

    return [f"{term}_loss" for term in term_options(config)]


def log_also(names: Sequence[str]) -> None:
    """Makes Megatron-LM's training loop log these names beside its own.

    Up to 0.17 the loop calls a function, which this replaces in `megatron.training.training`; later it asks a tracker, for
    which Megatron-Core has a setter."""
    try:
        from megatron.core.transformer.moe import moe_logging
    except ImportError:
        from megatron.training import training

        training.track_moe_metrics = with_names(training.track_moe_metrics, names)
        return
    tracker = moe_logging.get_moe_metrics_tracker()
    tracker.report = with_names(tracker.report, names)


def with_names(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """Megatron's function that logs, with further names in its argument `track_names` (None there means all)."""

    @wraps(function)
    def wrapped(*arguments: Any, track_names: Any = None, **options: Any) -> Any:
        if track_names is not None:
            asked = [track_names] if isinstance(track_names, str) else track_names
            track_names = list(dict.fromkeys([*asked, *names]))
        return function(*arguments, track_names=track_names, **options)

    return wrapped
