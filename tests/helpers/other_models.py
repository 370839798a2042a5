"""Tiny models of other programs' architectures with random weights, saved by Transformers, and one that it does not have."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.random_runs import VOCABULARY, tokenizer

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
}
MOE = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}
QWEN = {"num_experts": 8, "intermediate_size": 80, "mlp_only_layers": [0], **MOE}
GLM = {"n_routed_experts": 8, "intermediate_size": 80, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, **MOE}
# Name -> model_type, keys beside COMMON. Together they have every option that can be imported.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24}),
    "olmoe-renormalised": (
        "olmoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24, "norm_topk_prob": True},
    ),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 48}),
    "qwen2_moe-plain": (
        "qwen2_moe",
        {
            **QWEN,
            "mlp_only_layers": [],
            "shared_expert_intermediate_size": 0,
            "qkv_bias": False,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "head_dim": 24, "tie_word_embeddings": True}),
    "qwen3_moe-renormalised": ("qwen3_moe", {**QWEN, "mlp_only_layers": [], "norm_topk_prob": True}),
    "glm4_moe": ("glm4_moe", {**GLM, "n_shared_experts": 1, "attention_bias": True, "routed_scaling_factor": 1.5}),
    "glm4_moe-qk_norm": (
        "glm4_moe",
        {**GLM, "n_shared_experts": 2, "use_qk_norm": True, "head_dim": 24, "norm_topk_prob": False},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 2,
            "intermediate_size": 80,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": False,
            "head_dim": 24,
        },
    ),
    "llama": ("llama", {"intermediate_size": 48, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"intermediate_size": 48, "head_dim": 24}),
}


def random_transformers(name: str) -> Any:
    """A model of Transformers with random weights, none of them trivial."""
    import transformers

    model_type, options = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **COMMON, **options, rope_parameters=dict(ROPE))
    return randomized(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@torch.no_grad()
def randomized(model: Any) -> Any:
    """The model with norms around 1, biases around 0, and matrices that keep the scale of what they multiply."""
    generator = torch.Generator().manual_seed(0)
    for label, value in model.state_dict().items():
        if value.is_floating_point() and value.numel():
            noise = torch.randn(value.shape, generator=generator)
            small = value.dim() == 1 or "correction_bias" in label
            value.copy_(1 + 0.2 * noise if "norm" in label else noise * (0.1 if small else value.shape[-1] ** -0.5))
    return model.eval()


def save(name: str, folder: Path, **options: Any) -> Any:
    """Saves such a model with a tokenizer; returns it. options: of `save_pretrained`."""
    model = random_transformers(name)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.model").write_bytes(tokenizer().model)
    return model


def save_deepseek(folder: Path) -> Any:
    """The layout of DeepSeek-MoE-16B, and the model of Transformers that computes the same: a qwen2_moe without biases whose
    shared experts are halved by their gate, and so have twice the down projection."""
    import transformers
    from safetensors.torch import load_file, save_file

    options = {"shared_expert_intermediate_size": 48, "qkv_bias": False, "rope_parameters": dict(ROPE)}
    config = transformers.AutoConfig.for_model("qwen2_moe", **COMMON, **QWEN, **options)
    model = randomized(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    with torch.no_grad():
        for label, value in model.named_parameters():
            if "shared_expert_gate" in label:
                value.zero_()
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    renamed = {}
    for label, value in stored.items():
        if "shared_expert_gate" not in label:
            halved = value / 2 if "shared_expert.down" in label else value
            renamed[label.replace("shared_expert.", "shared_experts.")] = halved
    save_file(renamed, folder / "model.safetensors")
    described = {
        **COMMON,
        **MOE,
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "intermediate_size": 80,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "hidden_act": "silu",
        "rope_theta": 10000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "modeling_deepseek.py").write_text("raise AssertionError('this code must not run')\n")
    (folder / "tokenizer.model").write_bytes(tokenizer().model)
    return model
