"""The losses in Megatron-Core models: sp, cp, lb and v. docs/megatron.md says what is exact and what is refused.

Three parts replace Megatron's own by subclassing, without a change to its source:

- `SpecializedConfig`: a `TransformerConfig` with the losses' coefficients. It refuses settings that would make them wrong.
- `SpecializedRouter` and `SpecializedMoELayer`: compute the losses during the forward pass.
- `specialized(spec)`: a layer or block spec with these two in place of Megatron's classes.

`pretrain.py` is Megatron-LM's pretrain_gpt.py with flags for the coefficients. Needs the package megatron-core >= 0.16.

Shapes: T tokens of a micro-batch on this rank, S sequence positions on this rank, B sequences, E experts, K experts per
token, R routed rows, F expert hidden width. Megatron's order of tokens is (S, B).
"""

# mypy: disable-error-code="import-untyped,import-not-found"

try:
    import megatron.core  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("megatron", "megatron.core"):
        raise
    message = "torchtitan_ext.adapters.megatron needs the package megatron-core, version 0.16 or newer"
    raise ModuleNotFoundError(message, name=error.name) from None

from torchtitan_ext.adapters.megatron.configuration import (
    Coefficients,
    SpecializedConfig,
    SpecializedMLAConfig,
    add_arguments,
    coefficients_of,
    specialized_config,
)
from torchtitan_ext.adapters.megatron.moe_layer import SpecializedMoELayer
from torchtitan_ext.adapters.megatron.router import SpecializedRouter
from torchtitan_ext.adapters.megatron.spec import layer_spec, specialized

__all__ = [
    "Coefficients",
    "SpecializedConfig",
    "SpecializedMLAConfig",
    "SpecializedMoELayer",
    "SpecializedRouter",
    "add_arguments",
    "coefficients_of",
    "layer_spec",
    "specialized",
    "specialized_config",
]
