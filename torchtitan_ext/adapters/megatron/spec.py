"""Megatron's specs with the classes of this adapter in place of its own."""

# mypy: disable-error-code="import-untyped,import-not-found"

import functools
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from torchtitan_ext.adapters.megatron.moe_layer import SpecializedMoELayer
from torchtitan_ext.adapters.megatron.neighbours import Neighbours
from torchtitan_ext.adapters.megatron.router import SpecializedRouter

Spec = TypeVar("Spec")


def specialized(spec: Spec) -> Spec:
    """A copy of a spec with `SpecializedMoELayer` and `SpecializedRouter` in place of MoELayer and TopKRouter.

    spec: of a layer, of a block of layers, or of a hybrid stack. A spec without an MoE layer comes back unchanged (a pipeline
    stage may have none). Raises ValueError where another subclass of MoELayer or another router is in the way.
    """
    result: Spec = _rewritten(spec, Neighbours())
    return result


def _rewritten(spec: Any, neighbours: Neighbours) -> Any:
    if isinstance(spec, list | tuple):
        parts = [_rewritten(part, neighbours) for part in spec]
        return spec if all(a is b for a, b in zip(parts, spec, strict=True)) else type(spec)(parts)
    if isinstance(spec, functools.partial) and _is_moe(spec.func):
        words = {**spec.keywords, "submodules": _submodules(spec.keywords["submodules"], neighbours)}
        return functools.partial(SpecializedMoELayer, *spec.args, **words)
    if isinstance(spec, ModuleSpec) and _is_moe(spec.module):
        return replace(spec, module=SpecializedMoELayer, submodules=_submodules(spec.submodules, neighbours))
    if is_dataclass(spec) and not isinstance(spec, type):
        values = {one.name: getattr(spec, one.name) for one in fields(spec) if one.init}
        changed = {name: _rewritten(value, neighbours) for name, value in values.items()}
        changed = {name: value for name, value in changed.items() if value is not values[name]}
        return replace(spec, **changed) if changed else spec
    return spec


def _is_moe(module: Any) -> bool:
    if not isinstance(module, type) or not issubclass(module, MoELayer) or module is SpecializedMoELayer:
        return False
    if module is not MoELayer:
        raise ValueError(
            f"specialized: the spec has {module.__name__}, which would be replaced; derive it from SpecializedMoELayer"
        )
    return True


def _submodules(submodules: Any, neighbours: Neighbours) -> Any:
    if submodules.router is not TopKRouter:
        raise ValueError(f"specialized: the spec has the router {submodules.router}, which would be replaced")
    return replace(submodules, router=functools.partial(SpecializedRouter, neighbours=neighbours))


def layer_spec(config: Any, vp_stage: int | None = None, **further: Any) -> Any:
    """The spec that Megatron would choose, specialized: for `--spec torchtitan_ext.adapters.megatron layer_spec`, which
    Megatron-LM calls since 0.19, and for callers of Megatron-Core.

    config: a TransformerConfig, or Megatron-LM's GPTModelConfig, whose `transformer` it is. vp_stage: of interleaved pipeline
    stages. further: passed to `get_gpt_decoder_block_spec` (pp_rank)."""
    if hasattr(config, "transformer"):
        from megatron.training.models.gpt import default_layer_spec

        return specialized(default_layer_spec(config, vp_stage))
    engine = config.transformer_impl == "transformer_engine"
    norms = {"normalization": config.normalization, "qk_l2_norm": config.qk_l2_norm}
    return specialized(get_gpt_decoder_block_spec(config, engine, vp_stage=vp_stage, **norms, **further))
