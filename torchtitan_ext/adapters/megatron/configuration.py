"""Megatron's configuration with the losses' coefficients."""

# mypy: disable-error-code="import-untyped,import-not-found"

import copy
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field, fields
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from pydantic import ValidationError

from torchtitan_ext.adapters.megatron.refusals import refusals
from torchtitan_ext.terms import REGISTRY, TermOptions

PREFIX = "moe_"


def _option(default: Any, text: str, *choices: str) -> Any:
    """A field of `Coefficients`, with the help text and the choices of its flag."""
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass
class Coefficients:
    """The fields that `SpecializedConfig` adds. With all coefficients 0 the model is Megatron's own, bit by bit.

    A field `moe_TERM_loss_coeff` is the weight of a loss term of `torchtitan_ext.terms`; the term's other options are the
    fields `moe_TERM_OPTION`. Combine with a subclass of TransformerConfig, this class first.
    """

    moe_sp_loss_coeff: float = _option(0.0, "Weight of sp, overlap of a token's experts; the paper uses 2e-3.")
    moe_sp_above_chance: bool = _option(
        False, "sp: max(cos^2 - 1/F, 0) in place of cos^2, F the experts' hidden width."
    )
    moe_cp_loss_coeff: float = _option(0.0, "Weight of cp, coupling of neighbouring MoE layers; the paper uses 1e-3.")
    moe_cp_source: str = _option(
        "all", "cp: experts of the earlier layer that the sum runs over.", "all", "activated", "transition"
    )
    moe_cp_form: str = _option("mass", "cp: minus the mass, or minus its logarithm.", "mass", "log")
    moe_lb_loss_coeff: float = _option(0.0, "Weight of lb, load balance over the tokens of moe_lb_scope.")
    moe_lb_scope: str = _option(
        "global", "lb: over all data-parallel ranks of a micro-step, or per sequence.", "global", "sequence"
    )
    moe_v_loss_coeff: float = _option(0.0, "Weight of v, variance of the gate weights.")
    moe_v_scope: str = _option("sequence", "v: tokens over which its means are taken.", "global", "sequence")
    moe_v_variant: str = _option("paper", "v: as in the paper, or as in its published code.", "paper", "code")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc] # TransformerConfig's
        self.check_losses()

    def check_losses(self) -> None:
        """Raises ValueError, with every reason, if the losses would be wrong or can't be computed with these settings."""
        reasons = refusals(self, term_options(self))
        if reasons:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(reasons))


@dataclass
class SpecializedConfig(Coefficients, TransformerConfig):
    """A TransformerConfig with coefficients of the losses. Raises ValueError for settings that would make them wrong."""


@dataclass
class SpecializedMLAConfig(Coefficients, MLATransformerConfig):
    """The same for models with multi-latent attention."""


CLASSES: dict[type, type] = {TransformerConfig: SpecializedConfig, MLATransformerConfig: SpecializedMLAConfig}


def specialized_config(config: Any, **coefficients: Any) -> Any:
    """A copy of a configuration that Megatron has made, with coefficients.

    config: a TransformerConfig or an instance of a subclass of it. coefficients: fields of `Coefficients`. Raises ValueError
    for settings that would make the losses wrong, TypeError for an unknown field.
    """
    unknown = coefficients.keys() - {one.name for one in fields(Coefficients)}
    if unknown:
        raise TypeError(f"specialized_config: {', '.join(sorted(unknown))}: no such field of Coefficients")
    result, kind = copy.copy(config), type(config)
    if not isinstance(config, Coefficients):
        if kind not in CLASSES:
            CLASSES[kind] = dataclass(type(f"Specialized{kind.__name__}", (Coefficients, kind), {}))
        result.__class__ = CLASSES[kind]
        for one in fields(Coefficients):
            setattr(result, one.name, one.default)
    for name, value in coefficients.items():
        setattr(result, name, value)
    result.check_losses()
    return result


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds a flag per field of `Coefficients`, such as --moe-sp-loss-coeff. For Megatron-LM's `extra_args_provider`."""
    group = parser.add_argument_group("losses of torchtitan_ext")
    for one in fields(Coefficients):
        flag, text = "--" + one.name.replace("_", "-"), one.metadata["help"]
        if isinstance(one.default, bool):
            group.add_argument(flag, action="store_true", help=text)
        else:
            kind, choices = type(one.default), one.metadata["choices"]
            group.add_argument(flag, type=kind, default=one.default, choices=choices, help=text)
    return parser


def coefficients_of(args: Namespace) -> dict[str, Any]:
    """The fields of `Coefficients` from parsed arguments, for `specialized_config`."""
    return {one.name: getattr(args, one.name) for one in fields(Coefficients)}


def term_options(config: Coefficients) -> dict[str, TermOptions]:
    """The options of every term with a coefficient above 0, by the term's name.

    Raises ValueError that names the field for a value that the term does not take."""
    given: dict[str, dict[str, Any]] = {}
    for one in fields(Coefficients):
        term, _, option = one.name.removeprefix(PREFIX).partition("_")
        given.setdefault(term, {})["weight" if option == "loss_coeff" else option] = getattr(config, one.name)
    options = {}
    for term, values in given.items():
        try:
            chosen = REGISTRY[term].Options.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            name = f"{PREFIX}{term}_{'loss_coeff' if key == 'weight' else key}"
            raise ValueError(f"{type(config).__name__}: {name} = {values[key]!r}: {first['msg']}") from None
        if chosen.weight > 0:
            options[term] = chosen
    return options
