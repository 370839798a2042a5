"""Our MoE layer and training step compared with other libraries': same shapes, tokens, dtype and process.

    python scripts/bench_peers.py                        MoE layer, medium geometry, 2,048 tokens, bfloat16
    python scripts/bench_peers.py --geometry small --dtype float32
    python scripts/bench_peers.py step                   training step, 4 layers, 2 x 1,024 tokens, bfloat16
    python scripts/bench_peers.py profile                the profile of our step

layer: forward and backward of ours with sp and cp, and of TorchTitan's `MoE` (which supports bfloat16 only) and
Transformers' Mixtral block, both without regularizers. step: forward, backward, clipping and AdamW of ours with lb, z,
sp and cp, and of Transformers' Mixtral with its load-balancing loss. Runs alternate; each pair gets new tokens, as a
training step does, so that experts get other numbers of rows. A ratio is the median of paired ratios, with a 95%
interval. Needs the extra `bench`; prints a note for a library that is not installed, and skips
it.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from benchmarking import GEOMETRY, VOCABULARY, inputs_of, interval, seconds
from peers import missing, mixtral_config, our_layer, torchtitan_layer, transformers_layer
from torch import Tensor, nn

from titan_moe.config.tables import Model, Optimizer
from titan_moe.estimate.counts import count
from titan_moe.model.gemm import CPU_MULTIPLIES_BFLOAT16
from titan_moe.model.init import init_weights
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.optim import build_optimizer
from titan_moe.runtime.allocator import keep_freed_memory
from titan_moe.runtime.device import peak_flops
from torchtitan_ext.terms import Setting, build_terms

TOKENS = 2048
WEIGHTS = {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3}

Work = Callable[[], object]


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def our_step(settings: Model, dtype: torch.dtype, inputs: Inputs) -> tuple[Work, Transformer]:
    model = Transformer(settings, build_terms(WEIGHTS, Setting(settings.moe.top_k, settings.moe.hidden_dim)), dtype)
    init_weights(model, seed=0)
    optimizer = build_optimizer(model, Optimizer())

    def step() -> None:
        out = model(inputs)
        update(model, optimizer, out.ce + model.terms.objective(out.carry.terms))

    return step, model


def transformers_step(settings: Model, dtype: torch.dtype, tokens: Tensor) -> Work:
    import transformers

    model: Any = transformers.MixtralForCausalLM(mixtral_config(settings, TOKENS, WEIGHTS["lb"]))
    model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    return lambda: update(model, optimizer, model(input_ids=tokens, labels=tokens).loss)


def new_tokens(inputs: Inputs) -> None:
    inputs.labels.copy_(inputs.tokens.random_(VOCABULARY).roll(-1, 1))


def compare(peer: str, ours: Work, theirs: Work, renew: Work, pairs: int, flops: float, peak: float) -> None:
    for _ in range(3):
        renew()
        ours()
        theirs()
    times = []
    for pair in range(pairs):
        renew()
        if pair % 2:
            b, a = seconds(theirs), seconds(ours)
        else:
            a, b = seconds(ours), seconds(theirs)
        times.append((a, b))
    ratios = [a / b for a, b in times]
    low, high = interval(ratios)
    utilization = [flops / statistics.median(column) / peak for column in zip(*times, strict=True)]
    print(
        f"| {peer} | {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} ({pairs}) | {utilization[0]:.2f} "
        f"| {utilization[1]:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["layer", "step", "profile"], default="layer")
    parser.add_argument("--geometry", choices=list(GEOMETRY), default="medium")
    parser.add_argument("--layers", type=int, default=4, help="layers of the training step")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    dtype = getattr(torch, options.dtype)
    settings = GEOMETRY[options.geometry].model_copy(update={"layers": options.layers, "vocab_size": VOCABULARY})
    if options.what == "profile":
        step, _ = our_step(settings, dtype, inputs_of(2, TOKENS // 2))
        step()
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45))
        return
    installed = {name: not missing(name) for name in ("torchtitan", "transformers")}
    for name, found in installed.items():
        if not found:
            print(f"{name} is not installed and is skipped: pip install -e '.[bench]'")
    peak = peak_flops(torch.device("cpu"), dtype)
    print(
        f"{options.what}, {options.geometry}, {TOKENS} tokens, {options.dtype}; float32 GEMM peak {peak / 1e9:.0f} GFLOP/s"
    )
    print(f"bfloat16 units: {'yes' if CPU_MULTIPLIES_BFLOAT16 else 'no, ours multiplies in float32'}")
    print(
        "| peer | ours / theirs | 95% interval (pairs) | fraction of peak: ours | theirs |\n|---|---|---|---|---|",
        flush=True,
    )
    if options.what == "step":
        if installed["transformers"]:
            inputs = inputs_of(2, TOKENS // 2)
            step, model = our_step(settings, dtype, inputs)
            theirs = transformers_step(settings, dtype, inputs.tokens)
            flops = count(model, TOKENS // 2).flops_per_token * TOKENS
            compare("Transformers", step, theirs, lambda: new_tokens(inputs), options.pairs, flops, peak)
        return
    moe = settings.moe
    flops = 6 * TOKENS * settings.dim * (3 * moe.top_k * moe.hidden_dim + moe.experts)
    x_TD = torch.randn(TOKENS, settings.dim).to(dtype)
    ours = our_layer(settings, {"sp": WEIGHTS["sp"], "cp": WEIGHTS["cp"]}, x_TD)
    if installed["torchtitan"] and dtype == torch.bfloat16:
        compare("TorchTitan", ours, torchtitan_layer(settings, x_TD), x_TD.normal_, options.pairs, flops, peak)
    if installed["transformers"]:
        compare("Transformers", ours, transformers_layer(settings, x_TD), x_TD.normal_, options.pairs, flops, peak)


if __name__ == "__main__":
    main()
