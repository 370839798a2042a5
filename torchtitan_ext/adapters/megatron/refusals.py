"""Settings of Megatron that would make a loss wrong, each with its reason. docs/megatron.md lists them for users.

A loss that can't be computed exactly is refused when the configuration is made, not approximated.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torchtitan_ext.terms import TermOptions

OFF: tuple[Any, ...] = (None, False, "none", [])


def refusals(config: Any, options: Mapping[str, TermOptions]) -> list[str]:
    """Why these losses can't be computed with this configuration; empty if they can.

    config: a TransformerConfig. options: those of the terms with a weight, by name."""
    reasons: list[str] = []
    if options:
        reasons += _of_any(config, "/".join(options))
    if "sp" in options:
        reasons += _of_sp(config)
    if "cp" in options:
        reasons += _of_cp(config, options["cp"])
    for name in ("lb", "v"):
        if name in options and getattr(options[name], "scope", "") == "microbatch":
            reasons.append(
                f"moe_{name}_scope = 'microbatch' depends on the split into micro-batches, and Megatron's aux_loss has it; "
                "use 'global' or 'sequence'"
            )
    return reasons


def _set(config: Any, *names: str) -> Iterator[str]:
    """`NAME = value` for each of these settings that is not off. A version without a setting has it off."""
    for name in names:
        value = getattr(config, name, None)
        if value not in OFF:
            yield f"{name} = {value!r}"


def _of_any(config: Any, losses: str) -> Iterator[str]:
    if not config.num_moe_experts:
        yield f"{losses}: num_moe_experts is not set, the model has no experts"
    for setting in _set(config, "moe_expert_capacity_factor", "moe_expert_rank_capacity_factor"):
        yield f"{losses} with {setting}: dropped tokens have fewer than k experts"
    for setting in _set(config, "overlap_moe_expert_parallel_comm"):
        yield f"{losses} with {setting}: the parts of a layer run interleaved with those of another micro-batch"
    for setting in _set(config, "enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl"):
        yield f"{losses} with {setting}: a CUDA graph would replay the recording of values for the log"
    for setting in _set(config, "mtp_num_layers"):
        yield f"{losses} with {setting}: the layers of multi-token prediction see other tokens and have numbers of their own"
    kinds = config.moe_router_load_balancing_type
    for kind in (kinds,) if isinstance(kinds, str) else tuple(kinds):
        if kind in ("sinkhorn", "quantile_balancing"):
            yield f"{losses} with moe_router_load_balancing_type = {kind!r}: its choice does not follow the router's scores"


def _of_sp(config: Any) -> Iterator[str]:
    if config.moe_router_topk < 2:
        yield f"sp compares the experts of a token: moe_router_topk = {config.moe_router_topk}"
    if (config.expert_tensor_parallel_size or 1) > 1:
        yield (
            f"sp with expert_tensor_parallel_size = {config.expert_tensor_parallel_size}: cosines need all hidden units of "
            "an expert on one rank; set it to 1"
        )
    dispatcher = config.moe_token_dispatcher_type
    if dispatcher == "flex":
        yield (
            "sp with moe_token_dispatcher_type = 'flex': DeepEP and HybridEP sum a token's rows while sending them; "
            "use 'alltoall'"
        )
    if dispatcher == "allgather" and config.expert_model_parallel_size > 1:
        yield (
            "sp with moe_token_dispatcher_type = 'allgather' and expert_model_parallel_size > 1: it sums a token's rows "
            "over ranks; use 'alltoall'"
        )
    for setting in _set(config, "use_transformer_engine_op_fuser"):
        yield f"sp with {setting}: the input of linear_fc2 is never a tensor"
    for setting in _set(config, "moe_shared_expert_overlap"):
        yield f"sp with {setting}: sending sp's rows would start the shared expert's computation a second time"
    for setting in _set(config, "moe_router_padding_for_quantization", "moe_router_padding_for_fp8", "fp8", "fp4"):
        yield f"sp with {setting}: rows that belong to no token are added to each expert"
    for setting in _set(config, "fine_grained_activation_offloading"):
        yield f"sp with {setting}: memory that sp reads in the backward pass is released"
    for setting in _set(config, "moe_use_legacy_grouped_gemm"):
        yield f"sp with {setting}: this class of experts has no linear_fc2"


def _of_cp(config: Any, options: Any) -> Iterator[str]:
    stages = config.pipeline_model_parallel_size
    hybrid = getattr(config, "is_hybrid_model", False)
    if options.form == "log" and options.source == "transition":
        yield "moe_cp_form = 'log' takes each token's mass, which moe_cp_source = 'transition' does not have"
    if hybrid and stages > 1:
        yield (
            f"cp in a hybrid model with pipeline_model_parallel_size = {stages}: a stage does not know "
            "which MoE layer is the first"
        )
    if not hybrid and config.num_moe_experts and len(moe_layer_numbers(config)) < 2:
        yield "cp couples neighbouring MoE layers: num_layers and moe_layer_freq give fewer than two"
    if options.source == "all":
        return
    needs = f"cp with moe_cp_source = {options.source!r} needs the scores of the MoE layer before"
    if stages > 1:
        yield f"{needs}, and pipeline_model_parallel_size = {stages} puts it on another rank; use 'all'"
    modules = config.recompute_modules or []
    if config.recompute_granularity == "full":
        yield f"{needs}, and recompute_granularity = 'full' recomputes layers in reverse order; use 'all'"
    elif config.recompute_granularity == "selective" and "moe" in modules:
        yield f"{needs}, and recompute_modules with 'moe' recomputes layers in reverse order; use 'all' or 'moe_act'"


def moe_layer_numbers(config: Any) -> list[int]:
    """The numbers of the layers that `moe_layer_freq` makes MoE layers, over all pipeline stages; 1 is the first layer."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return list(range(1, config.num_layers + 1, frequency))
    return [number for number, moe in enumerate(frequency, start=1) if moe]
