"""Writes a small MoE model with random weights, and a tokenizer with a chat template: to try fine-tuning on a CPU.

    python scripts/make_tiny_model.py qwen3_moe tiny-qwen3

Architectures: qwen3_moe (Qwen3-30B-A3B), deepseek_v2 (DeepSeek-V2-Lite), qwen2_moe (a converted DeepSeek-MoE-16B), glm4_moe
(sigmoid scores with a balancing bias). Needs the extra hf.
"""

import argparse
import sys
import sysconfig
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_moe.errors import UserError
from titan_moe.runtime.optional import optional

PIECES = 512
BASIC = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**BASIC, "num_experts": 8, "head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {**BASIC, "num_experts": 8, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "deepseek_v2": {
        **BASIC,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "glm4_moe": {
        **BASIC,
        "head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
    },
}
# ChatML, as Qwen's models have it. The markers say which tokens the assistant's are.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer() -> Any:
    """A byte-level BPE of 512 pieces, trained on modules of the standard library."""
    tokenizers, transformers = optional("tokenizers", "hf"), optional("transformers", "hf")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    symbols = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=PIECES, special_tokens=symbols, initial_alphabet=alphabet)
    texts = [
        path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
    ]
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(kind: str, seed: int = 0) -> Any:
    """A model of an architecture, its weights drawn by the seed."""
    transformers, torch = optional("transformers", "hf"), optional("torch", "hf")
    options = {"vocab_size": PIECES, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **SIZES[kind], **options, tie_word_embeddings=False)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=[*SIZES])
    parser.add_argument("output", type=Path, help="the directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args()
    try:
        if arguments.output.exists():
            raise UserError(f"output = {str(arguments.output)!r}: exists already; remove it or name another one")
        model = make_model(arguments.architecture, arguments.seed)
        model.save_pretrained(arguments.output)
        make_tokenizer().save_pretrained(arguments.output)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output}: {arguments.architecture}, {model.num_parameters():,} parameters with random values")


if __name__ == "__main__":
    main()
