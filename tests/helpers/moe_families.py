"""Tiny models of every family of Transformers that the adapter serves, with random weights."""

from typing import Any, NamedTuple

import torch

VOCABULARY = 96
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24}
OLMO = {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24}
QWEN = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


class Family(NamedTuple):
    """score: its score function. options: of its configuration, beside BASE."""

    score: str
    options: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "mixtral": Family("softmax", MIXTRAL),
    "olmoe": Family("softmax", OLMO),
    "flex_olmo": Family("softmax", OLMO),
    "qwen2_moe": Family("softmax", {**QWEN, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Family("softmax", {**QWEN, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3_next": Family(
        "softmax",
        {
            **QWEN,
            **LINEAR,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
    ),
    "lara_mini": Family(
        "softmax",
        {
            **QWEN,
            **LINEAR,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 64,
        },
    ),
    "ernie4_5_moe": Family(
        "softmax",
        {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "intermediate_size": 40,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
    ),
    "deepseek_v2": Family("softmax", {**DEEPSEEK, **LATENT}),
    "hunyuan_v1_moe": Family("softmax", {"num_experts": 8, "moe_topk": 3, "intermediate_size": 24, "head_dim": 8}),
    "gpt_oss": Family(
        "softmax",
        {
            **MIXTRAL,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 64,
        },
    ),
    "granitemoe": Family("softmax", MIXTRAL),
    "granitemoeshared": Family("softmax", {**MIXTRAL, "shared_intermediate_size": 16}),
    "jamba": Family(
        "softmax",
        {
            **OLMO,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 1,
            "attn_layer_offset": 0,
            "use_mamba_kernels": False,
        },
    ),
    "minimax": Family("softmax", {**MIXTRAL, "head_dim": 8, "layer_types": ["full_attention"] * 3, "block_size": 16}),
    "deepseek_v3": Family("sigmoid", {**DEEPSEEK, **LATENT}),
    "glm4_moe": Family("sigmoid", {**DEEPSEEK, "head_dim": 8, "num_nextn_predict_layers": 0}),
    "glm4_moe_lite": Family(
        "sigmoid",
        {**DEEPSEEK, **LATENT, "mlp_layer_types": ["dense", "sparse", "sparse"], "num_nextn_predict_layers": 0},
    ),
    "dots1": Family(
        "sigmoid",
        {
            **DEEPSEEK,
            "head_dim": 8,
            "norm_topk_prob": True,
            "layer_types": ["full_attention"] * 3,
            "sliding_window": 64,
        },
    ),
    "bailing_hybrid": Family(
        "sigmoid",
        {
            **DEEPSEEK,
            **LATENT,
            "num_experts": 8,
            "num_experts_per_token": 3,
            "num_shared_experts": 1,
            "num_expert_group": 1,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
    ),
    "solar_open": Family("sigmoid", {**DEEPSEEK, "head_dim": 8}),
    "minimax_m2": Family("sigmoid", {**MIXTRAL, "head_dim": 8, "rotary_dim": 8}),
    "afmoe": Family(
        "sigmoid",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 64,
        },
    ),
    "lfm2_moe": Family(
        "sigmoid",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "full_attention"],
        },
    ),
    "sarvam_moe": Family("sigmoid", {**DEEPSEEK, "head_dim": 8}),
}


def build(name: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with random weights that are the same at every call; in training mode."""
    import transformers

    config = transformers.AutoConfig.for_model(name, **{**BASE, **FAMILIES[name].options, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    model.set_experts_implementation(implementation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for label, value in model.state_dict().items():
            if value.is_floating_point() and value.numel() and "inv_freq" not in label:
                noise = torch.randn(value.shape, generator=generator)
                small = value.dim() == 1 or "correction_bias" in label or "bias" in label.rpartition(".")[2]
                if "gate.w" in label or "router" in label:
                    noise = noise * 2.0  # so that scores differ
                value.copy_(1 + 0.2 * noise if "norm" in label else noise * (0.1 if small else value.shape[-1] ** -0.5))
    return model.train()


def batch(rows: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels (rows, length): prompts without labels, and a padded end."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[-1, length - 4 :] = -100
    return ids, labels
