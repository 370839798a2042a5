"""One training step of ours against Transformers' Mixtral: same geometry, tokens, dtype, optimizer and process.

    python scripts/bench_step.py                         medium geometry, 4 layers, 2 x 1,024 tokens, bfloat16
    python scripts/bench_step.py --dtype float32 --repeats 5
    python scripts/bench_step.py --profile               where our step goes

Steps of A (ours, with lb, z, sp and cp on) and B (theirs, with its load-balance loss) alternate; the ratio is the median of
the paired ratios. Needs the extra `bench`. Times are this machine's; the ratio and the share of the GEMM peak carry over.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titan_moe.config.tables import Model, MoE, Optimizer
from titan_moe.model.counts import count
from titan_moe.model.gemm import cpu_multiplies_bfloat16
from titan_moe.model.init import init_weights
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.train.device import keep_freed_memory, peak_flops
from titan_moe.train.optimizer import build_optimizer
from torchtitan_ext.terms import Terms

VOCABULARY, BATCH, SEQ = 32000, 2, 1024
GEOMETRY = {
    "small": Model(dim=576, heads=9, moe=MoE(experts=16, top_k=2, hidden_dim=1104)),
    "medium": Model(dim=512, heads=8, moe=MoE(experts=64, top_k=4, hidden_dim=672)),
}
WEIGHTS = {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3}


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def ours(settings: Model, dtype: torch.dtype, tokens: Tensor) -> tuple[Callable[[], None], Transformer]:
    model = Transformer(settings, Terms(WEIGHTS, settings.moe.top_k), dtype)
    init_weights(model, seed=0)
    optimizer = build_optimizer(model, Optimizer())
    weights = torch.full(tokens.shape, 1.0 / tokens.numel())
    positions = torch.arange(SEQ).expand_as(tokens)
    sequences, step_number = torch.arange(BATCH), torch.tensor(1)
    inputs = Inputs(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), positions, weights, sequences, step_number)

    def step() -> None:
        out = model(inputs)
        update(model, optimizer, out.ce + model.terms.objective(out.carry.terms))

    return step, model


def theirs(settings: Model, dtype: torch.dtype, tokens: Tensor) -> Callable[[], None]:
    import transformers

    config: Any = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.dim,
        intermediate_size=settings.moe.hidden_dim,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        num_local_experts=settings.moe.experts,
        num_experts_per_tok=settings.moe.top_k,
        max_position_embeddings=SEQ,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=WEIGHTS["lb"],
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    model: Any = transformers.MixtralForCausalLM(config)
    model = model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    return lambda: update(model, optimizer, model(input_ids=tokens, labels=tokens).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(GEOMETRY), default="medium")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    dtype = getattr(torch, options.dtype)
    settings = GEOMETRY[options.geometry].model_copy(update={"layers": options.layers, "vocab_size": VOCABULARY})
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    our_step, model = ours(settings, dtype, tokens)
    our_step()
    if options.profile:
        with torch.profiler.profile() as profile:
            our_step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45))
        return
    their_step = theirs(settings, dtype, tokens)
    their_step()
    pairs = [(seconds(our_step), seconds(their_step)) for _ in range(options.repeats)]
    ratio = statistics.median(a / b for a, b in pairs)
    peak = peak_flops(torch.device("cpu"), dtype)
    flops = count(model, SEQ).flops_per_token * tokens.numel()
    print(f"{options.geometry}, {options.layers} layers, {BATCH} x {SEQ} tokens, {options.dtype}, AdamW")
    print(f"bfloat16 units: {'yes' if cpu_multiplies_bfloat16() else 'no, ours multiplies through float32'}")
    for a, b in pairs:
        print(f"  ours {a:7.2f} s   theirs {b:7.2f} s   ratio {a / b:.3f}")
    print(f"ratio, median of {len(pairs)} pairs: {ratio:.3f}")
    for name, times in zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True):
        print(
            f"{name}: {flops / statistics.median(times) / peak:.2f} of the float32 GEMM peak ({peak / 1e9:.0f} GFLOP/s)"
        )


if __name__ == "__main__":
    main()
