"""The cost of attached terms in a forward and backward of a model of Transformers.

    python scripts/bench_attach.py                                         sp and cp, qwen3_moe of the medium geometry
    python scripts/bench_attach.py --family mixtral --implementation eager --terms sp cp z --pairs 21
    python scripts/bench_attach.py --family deepseek_v3 --layers 2 --sequences 1 --checkpointing

Forward and backward with the terms attached and without alternate, in reversed order every second pair, in one process on one
model with random weights. The ratio is the median of the paired ratios, with a 95% interval from their order statistics.
Needs the extra `hf`.
"""

import argparse
import statistics
from typing import Any

import torch
from benchmarking import GEOMETRY, VOCABULARY, interval, seconds

from titan_moe.runtime.allocator import keep_freed_memory
from torchtitan_ext.adapters.transformers import attach

WEIGHTS = {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3, "o": 1e-3, "v": 1e-3, "erc": 1.0}
LATENT = {"kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}


def build(family: str, geometry: str, layers: int, implementation: str, dtype: torch.dtype) -> Any:
    """A model of a family with our benchmarks' sizes and random weights."""
    import transformers

    model = GEOMETRY[geometry]
    moe = model.moe
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": model.dim,
        "num_hidden_layers": layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "num_experts_per_tok": moe.top_k,
        "max_position_embeddings": 4096,
    }
    families: dict[str, dict[str, Any]] = {
        "mixtral": {"num_local_experts": moe.experts, "intermediate_size": moe.hidden_dim},
        "qwen3_moe": {
            "num_experts": moe.experts,
            "moe_intermediate_size": moe.hidden_dim,
            "head_dim": model.dim // model.heads,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        },
        "deepseek_v3": {
            "n_routed_experts": moe.experts,
            "moe_intermediate_size": moe.hidden_dim,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            **LATENT,
        },
    }
    config = transformers.AutoConfig.for_model(family, **sizes, **families[family])
    made: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    made.set_experts_implementation(implementation)
    return made.train()


def forward_backward(model: Any, tokens: torch.Tensor) -> None:
    """One micro-batch, with every token labelled."""
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["qwen3_moe", "mixtral", "deepseek_v3"], default="qwen3_moe")
    parser.add_argument("--geometry", choices=list(GEOMETRY), default="medium")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--implementation", choices=["grouped_mm", "batched_mm", "eager"], default="grouped_mm")
    parser.add_argument("--terms", nargs="+", choices=list(WEIGHTS), default=["sp", "cp"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--checkpointing", action="store_true", help="recompute every layer in the backward")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = build(arguments.family, arguments.geometry, arguments.layers, arguments.implementation, dtype)
    model.to(arguments.device)
    if arguments.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, VOCABULARY, (arguments.sequences, arguments.seq)).to(arguments.device)

    def work() -> None:
        forward_backward(model, tokens)
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    def with_terms() -> float:
        attached = attach(model, {name: WEIGHTS[name] for name in arguments.terms})
        attached.step = 1
        try:
            return seconds(work)
        finally:
            attached.detach()

    def without() -> float:
        return seconds(work)

    for warm_up in (with_terms, without, with_terms, without):
        warm_up()
    ratios, plain = [], []
    for pair in range(arguments.pairs):
        if pair % 2:
            own = with_terms()
            other = without()
        else:
            other = without()
            own = with_terms()
        ratios.append(own / other)
        plain.append(other)
    low, high = interval(ratios)
    size = f"{arguments.family}, {arguments.geometry}, {arguments.layers} layers, {arguments.implementation}, {arguments.dtype}"
    print(f"{size}, {tokens.numel()} tokens: {statistics.median(plain):.3f} s without terms")
    print(
        f"{'+'.join(arguments.terms)}: x {statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}] of {len(ratios)} pairs"
    )


if __name__ == "__main__":
    main()
