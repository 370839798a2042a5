"""Finds the routers and experts of a model of Transformers, and refuses what the adapter cannot serve.

Transformers 5 builds nearly every MoE layer of two modules. The router returns (logits (T, E), gate weights (T, K), expert
ids (T, K)); the experts module has fused weights, and its forward looks up a function in `ALL_EXPERTS_FUNCTIONS`.
"""

import operator
from typing import Any, NamedTuple

from torch import Tensor, nn

PREFIX = "titan_moe_"
"""Before the names of the implementations that our experts functions observe."""
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")
"""Names of K in configurations."""
SCORES = {
    "softmax": "mixtral olmoe flex_olmo qwen2_moe qwen3_moe qwen3_next lara_mini ernie4_5_moe deepseek_v2 hunyuan_v1_moe "
    "gpt_oss granitemoe granitemoeshared jamba minimax",
    "sigmoid": "deepseek_v3 glm4_moe glm4_moe_lite dots1 bailing_hybrid solar_open minimax_m2 afmoe lfm2_moe sarvam_moe",
}
"""Score functions by model_type: no configuration names them. Softmax of the chosen logits counts as softmax."""


class MoELayer(NamedTuple):
    """The parts of one MoE layer."""

    name: str
    """Path of the experts module."""
    router: nn.Module
    experts: nn.Module
    weight_name: str
    """Attribute path of the router's weight (E, D)."""

    @property
    def router_weight(self) -> Tensor:
        weight: Tensor = operator.attrgetter(self.weight_name)(self.router)
        return weight

    @property
    def gate_weight(self) -> Tensor:
        """The experts' SwiGLU gate projections, (E, F, D)."""
        experts: Any = self.experts
        gate_up = experts.gate_up_proj.transpose(1, 2) if experts.is_transposed else experts.gate_up_proj
        return gate_up[:, : gate_up.shape[1] // 2] if experts.is_concatenated else gate_up[:, ::2]


class Structure(NamedTuple):
    """What the adapter knows of a model."""

    layers: tuple[MoELayer, ...]
    experts: int
    top_k: int
    hidden_dim: int
    """Width F of an expert's activations."""
    logits_index: int
    """Position of the logits in what a router returns."""
    implementation: str
    """The experts implementation that the model has."""
    score: str | None
    """None: found at the first forward."""


def causal_lm(model: Any) -> Any:
    """The model of Transformers inside wrappers of PEFT and DistributedDataParallel."""
    while True:
        if type(model).__name__ == "DistributedDataParallel":
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def find_structure(model: Any, score: str | None = None) -> Structure:
    """The routers and experts of a model. Raises ValueError that names the model type and what it lacks."""
    config = model.config.get_text_config()
    kind = config.model_type
    if score not in (None, "softmax", "sigmoid"):
        raise ValueError(f"attach: score={score!r} is not one of 'softmax', 'sigmoid'")
    target, index = _router_class(model, kind)
    named = dict(model.named_modules())
    routers = [(name, module) for name, module in named.items() if isinstance(module, target)]
    experts = [
        (name, module)
        for name, module in named.items()
        if hasattr(module, "_apply_gate") and hasattr(module, "_is_expert_parallel")
    ]
    if not experts or len(experts) != len(routers):
        raise ValueError(
            f"attach: {kind}: {len(routers)} routers and {len(experts)} modules with the interface for experts functions; "
            "it needs one of each in every MoE layer"
        )
    layers = [_layer(kind, *router, *expert) for router, expert in zip(routers, experts, strict=True)]
    sizes = {(int(one.num_experts), _hidden_dim(one)) for _, one in experts}
    if len(sizes) > 1:
        raise ValueError(f"attach: {kind}: MoE layers differ in (experts, width): {sorted(sizes)}")
    if getattr(model, "tp_size", None) not in (None, 1) or any(one._is_expert_parallel for _, one in experts):
        raise ValueError(f"attach: {kind}: experts are split over ranks (tensor or expert parallelism)")
    # A copy of an attached model has the name of our function.
    implementation = (config._experts_implementation or "eager").removeprefix(PREFIX)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attach: experts implementation {implementation!r} does not show activations; call "
            f"model.set_experts_implementation with one of {', '.join(IMPLEMENTATIONS)} first"
        )
    for name, types in SCORES.items():
        if score is None and kind in types.split():
            score = name
    ((count, width),) = sizes
    top_k = next((getattr(config, name) for name in TOP_K if getattr(config, name, None) is not None), None)
    top_k = top_k[0] if isinstance(top_k, list) else top_k
    if not isinstance(top_k, int):
        raise ValueError(f"attach: {kind}: its configuration has none of {', '.join(TOP_K)}")
    return Structure(tuple(layers), count, top_k, width, index, implementation, score)


def _router_class(model: Any, kind: str) -> tuple[type[nn.Module], int]:
    """The class of the routers, and the position of the logits in what they return: what Transformers itself records."""
    from transformers.utils.output_capturing import OutputRecorder

    for module in model.modules():
        recorded = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits")
        if isinstance(recorded, OutputRecorder):
            return recorded.target_class, recorded.index
        if isinstance(recorded, type):
            return recorded, 1  # what Transformers takes when a class alone is given
    raise ValueError(f"attach: {kind}: is no Mixture-of-Experts model whose router logits Transformers can record")


def _layer(kind: str, router_name: str, router: nn.Module, name: str, experts: nn.Module) -> MoELayer:
    block = router_name.replace(".base_layer", "").rpartition(".")[0]  # PEFT wraps modules whose parameters it adapts
    if not name.startswith(f"{block}."):
        raise ValueError(f"attach: {kind}: router {router_name} and experts {name} are not in the same layer")
    if not getattr(experts, "has_gate", False):
        raise ValueError(f"attach: {kind}: experts {name} have no gate, so no SwiGLU activations")
    count: Any = experts.num_experts
    weights = [one for one, value in router.named_parameters() if value.dim() == 2 and value.shape[0] == count > 1]
    if len(weights) != 1:
        raise ValueError(
            f"attach: {kind}: router {router_name} has {len(weights)} weights of shape (experts, dim), not one"
        )
    return MoELayer(name, router, experts, weights[0])


def _hidden_dim(experts: Any) -> int:
    return int(experts.down_proj.shape[1 if experts.is_transposed else 2])
