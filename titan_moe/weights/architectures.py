"""The Transformers architectures that compute what our model computes: their config.json, and which of them fits a model.

Source: transformers 5.24, `models/*/configuration_*.py` and `modeling_*.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from titan_moe.config.tables import Model
from titan_moe.errors import UserError
from titan_moe.weights.names import NAMES, Names, dense_width, kv_heads

COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
"""Keys of config.json that every architecture has, and the options of our table [model]."""

LONGEST = 1 << 20
"""Tokens of the window of an architecture that can't attend to everything."""


def dense_layers(model: Model) -> list[int]:
    return list(range(model.moe.first_dense_layers))


def shared_width(model: Model) -> int:
    return model.moe.hidden_dim * model.moe.shared_experts


@dataclass(frozen=True)
class Architecture:
    """A model class of Transformers."""

    model_type: str
    class_name: str
    fields: dict[str, str]
    """Keys of config.json beside `COMMON`, and the options of our table [model] with the same value."""
    computed: dict[str, Callable[[Model], Any]]
    """Keys whose value follows from several of our options."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Keys whose value is always this one: with another value the architecture computes something else than our model."""
    rotary: dict[str, Callable[[Model], Any]] = field(default_factory=dict)
    """Further keys of `rope_parameters`."""
    window: bool = False
    """Whether attention has a window, which must then be no shorter than any text."""

    @property
    def names(self) -> Names:
        return NAMES[self.model_type]

    def config(self, model: Model, positions: int) -> dict[str, Any]:
        """The model's part of config.json. model: with its vocabulary size. positions: length of the sequences."""
        known = {key: option(model, name) for key, name in (COMMON | self.fields).items()}
        known |= {key: compute(model) for key, compute in self.computed.items()}
        if self.window:
            known["sliding_window"] = max(positions, LONGEST)
        rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
        rotary |= {key: compute(model) for key, compute in self.rotary.items()}
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "max_position_embeddings": positions,
            **known,
            **self.fixed,
            "rope_parameters": rotary,
            "router_aux_loss_coef": 0.0,
        }


def option(model: Model, name: str) -> Any:
    """The value of an option of [model], such as "moe.experts", with the value that 0 stands for in its place."""
    if name == "kv_heads":
        return kv_heads(model)
    if name == "head_dim":
        return model.head_width
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part)
    return value


QWEN_FIELDS = {
    "num_experts": "moe.experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.hidden_dim",
    "norm_topk_prob": "moe.normalize_topk",
}
QWEN_COMPUTED: dict[str, Callable[[Model], Any]] = {"intermediate_size": dense_width, "mlp_only_layers": dense_layers}
QWEN_FIXED = {"decoder_sparse_step": 1, "use_sliding_window": False}

ARCHITECTURES = {
    one.model_type: one
    for one in (
        Architecture(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            QWEN_FIELDS,
            {**QWEN_COMPUTED, "shared_expert_intermediate_size": shared_width},
            # With zeros as biases, since vLLM's Qwen2-MoE has biases whatever the configuration says.
            {**QWEN_FIXED, "qkv_bias": True},
        ),
        Architecture(
            "qwen3_moe", "Qwen3MoeForCausalLM", QWEN_FIELDS, QWEN_COMPUTED, {**QWEN_FIXED, "attention_bias": False}
        ),
        Architecture(
            "mixtral",
            "MixtralForCausalLM",
            {
                "num_local_experts": "moe.experts",
                "num_experts_per_tok": "moe.top_k",
                "intermediate_size": "moe.hidden_dim",
            },
            {},
            {"sliding_window": None},
        ),
        Architecture(
            "olmoe",
            "OlmoeForCausalLM",
            {
                "num_experts": "moe.experts",
                "num_experts_per_tok": "moe.top_k",
                "intermediate_size": "moe.hidden_dim",
                "norm_topk_prob": "moe.normalize_topk",
            },
            {},
            {"attention_bias": False, "clip_qkv": None},
        ),
        Architecture(
            "lara_mini",
            "LaraMiniForCausalLM",
            QWEN_FIELDS,
            {
                "shared_expert_intermediate_size": shared_width,
                # Only these layers have both softmax attention and rotary embeddings.
                "layer_types": lambda model: ["sliding_attention"] * model.layers,
            },
            {"attention_bias": False},
            window=True,
        ),
        Architecture(
            "ernie4_5_moe",
            "Ernie4_5_MoeForCausalLM",
            {
                "moe_num_experts": "moe.experts",
                "moe_k": "moe.top_k",
                "moe_intermediate_size": "moe.hidden_dim",
                "moe_num_shared_experts": "moe.shared_experts",
                "moe_layer_start_index": "moe.first_dense_layers",
            },
            {"intermediate_size": dense_width, "moe_layer_end_index": lambda model: model.layers - 1},
            {"use_bias": False, "moe_layer_interval": 1, "moe_norm_min": 1e-12},
        ),
        Architecture(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            {
                "n_routed_experts": "moe.experts",
                "num_experts_per_tok": "moe.top_k",
                "moe_intermediate_size": "moe.hidden_dim",
                "n_shared_experts": "moe.shared_experts",
                "first_k_dense_replace": "moe.first_dense_layers",
                "norm_topk_prob": "moe.normalize_topk",
                "routed_scaling_factor": "moe.route_scale",
                "use_qk_norm": "qk_norm",
            },
            {"intermediate_size": dense_width, "attention_bias": lambda model: model.qkv_bias},
            {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
            {"partial_rotary_factor": lambda model: model.rope_fraction},  # the default rotates half of each head
        ),
    )
}
"""By `model_type`."""


def fitting(model: Model, biased: bool) -> Architecture:
    """The architecture that computes what the model computes. Raises UserError when there is none.

    biased: whether a balancing bias is not zero. A bias of zeros chooses as none does."""
    architecture = by_routing(model, biased)
    of_type = architecture.model_type
    refused = {
        "model.qkv_bias": model.qkv_bias and of_type not in ("qwen2_moe", "glm4_moe"),
        "model.rope_fraction below 1": model.rope_fraction < 1 and of_type != "glm4_moe",
        "model.moe.shared_gate": model.moe.shared_gate and of_type != "qwen2_moe",
        "model.head_dim": of_type == "olmoe" and model.head_width * model.heads != model.dim,
    }
    for what, wrong in refused.items():
        if wrong:
            raise UserError(f"the architecture of Transformers with the rest of this model, {of_type}, has no {what}")
    return architecture


def by_routing(model: Model, biased: bool) -> Architecture:
    """The architecture by router, norms and kinds of layers. Raises UserError when there is none."""
    moe = model.moe
    if model.qk_norm == "projection":
        if moe.first_dense_layers or moe.shared_experts or moe.score == "sigmoid" or biased:
            raise UserError(
                "no architecture of Transformers has model.qk_norm = 'projection' with dense layers, shared experts, sigmoid "
                "scores or a balancing bias"
            )
        return ARCHITECTURES["olmoe"]
    has_moe, dense = moe.first_dense_layers < model.layers, moe.first_dense_layers > 0
    if not has_moe:
        return ARCHITECTURES["qwen3_moe" if model.qk_norm else "qwen2_moe"]
    if moe.score == "sigmoid":
        return ARCHITECTURES["glm4_moe"]
    if biased:
        if not moe.normalize_topk:
            raise refusal(
                "softmax scores with a balancing bias (balancer.rate) and gate weights that are not divided by their sum"
            )
        if model.qk_norm:
            raise refusal("softmax scores with a balancing bias (balancer.rate) and model.qk_norm")
        return ARCHITECTURES["ernie4_5_moe"]
    if not model.qk_norm:
        plain = moe.normalize_topk and not dense and not moe.shared_experts and not model.qkv_bias
        return ARCHITECTURES["mixtral" if plain else "qwen2_moe"]
    if not moe.shared_experts:
        return ARCHITECTURES["qwen3_moe"]
    if dense:
        raise refusal("softmax scores with model.qk_norm, shared experts and first dense layers")
    return ARCHITECTURES["lara_mini"]


def refusal(what: str) -> UserError:
    return UserError(
        f"no architecture of Transformers has {what}; export with --format gguf, which has them, or train with "
        "--model.moe.score=sigmoid, which glm4_moe has"
    )
