"""Our MoE layer and training step compared with other libraries': same shapes, tokens, dtype and process.

    python scripts/bench_peers.py                        MoE layer, medium geometry, 2,048 tokens, bfloat16
    python scripts/bench_peers.py --geometry small --dtype float32
    python scripts/bench_peers.py step                   training step, 4 layers, 2 x 1,024 tokens, bfloat16
    python scripts/bench_peers.py profile                the profile of our step

layer: forward and backward of ours with sp and cp, and of TorchTitan's `MoE` (which supports bfloat16 only) and
Transformers' Mixtral block, both without regularizers. step: forward, backward, clipping and AdamW of ours with lb, z,
sp and cp, and of Transformers' Mixtral with its load-balancing loss. Runs alternate; a ratio is the median of paired
ratios, with a 95% interval. Needs the extra `bench`; prints a note for a library that is not installed, and skips
it.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from benchmarking import GEOMETRY, VOCABULARY, inputs_of, interval, seconds
from torch import Tensor, nn

from titan_moe.config.tables import Model, Optimizer
from titan_moe.estimate.counts import count
from titan_moe.model.gemm import CPU_MULTIPLIES_BFLOAT16
from titan_moe.model.init import init_weights
from titan_moe.model.moe import MoELayer
from titan_moe.model.transformer import Transformer
from titan_moe.optim import build_optimizer
from titan_moe.runtime.allocator import keep_freed_memory
from titan_moe.runtime.device import peak_flops
from torchtitan_ext.carry import empty_carry
from torchtitan_ext.terms import Setting, Tokens, build_terms

TOKENS = 2048
WEIGHTS = {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3}

Work = Callable[[], object]


def fill(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


def our_layer(settings: Model, dtype: torch.dtype, x_TD: Tensor) -> Work:
    setting = Setting(settings.moe.top_k, settings.moe.hidden_dim)
    terms = build_terms({"sp": WEIGHTS["sp"], "cp": WEIGHTS["cp"]}, setting)
    layer = MoELayer(settings.dim, settings.moe, terms, 1)
    fill(layer)
    layer.to(dtype)
    carry = empty_carry(
        len(terms.names), TOKENS, 2, settings.moe.experts, torch.float32, x_TD.device, 1, len(terms.measures)
    )
    carry = carry._replace(previous=torch.ones(TOKENS, 1))
    tokens = Tokens(torch.full((1, TOKENS), 1.0 / TOKENS), torch.arange(1), torch.tensor(1), torch.arange(TOKENS))
    gradient = torch.randn_like(x_TD)

    def work() -> None:
        x = x_TD.detach().requires_grad_()
        out, after, _ = layer(x, carry, tokens)
        torch.autograd.backward([out, terms.objective(after.terms)], [gradient, torch.tensor(1.0)])
        layer.zero_grad()

    return work


def plain_work(layer: nn.Module, x_TD: Tensor) -> Work:
    gradient = torch.randn(1, *x_TD.shape, dtype=x_TD.dtype)

    def work() -> None:
        x = x_TD.detach().unsqueeze(0).requires_grad_()
        layer(x).backward(gradient)
        layer.zero_grad()

    return work


def torchtitan_layer(settings: Model, dtype: torch.dtype, x_TD: Tensor) -> Work:
    from torchtitan.models.common.config_utils import make_router_config
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    moe = settings.moe
    sizes: dict[str, int] = {"num_experts": moe.experts, "top_k": moe.top_k}
    experts = GroupedExperts.Config(dim=settings.dim, hidden_dim=moe.hidden_dim, num_experts=moe.experts)
    routed = RoutedExperts.Config(inner_experts=experts, token_dispatcher=LocalTokenDispatcher.Config(**sizes))
    router = make_router_config(dim=settings.dim, gate_param_init={}, score_func="softmax", **sizes)
    config = MoE.Config(num_experts=moe.experts, routed_experts=routed, router=router, load_balance_coeff=None)
    layer: nn.Module = config.build()
    fill(layer)
    return plain_work(layer.to(dtype), x_TD)


def mixtral_config(settings: Model) -> Any:
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
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=WEIGHTS["lb"],
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    return config


def transformers_layer(settings: Model, dtype: torch.dtype, x_TD: Tensor) -> Work:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    layer: nn.Module = MixtralSparseMoeBlock(mixtral_config(settings))
    fill(layer)
    return plain_work(layer.to(dtype).train(), x_TD)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def our_step(settings: Model, dtype: torch.dtype) -> tuple[Work, Transformer]:
    model = Transformer(settings, build_terms(WEIGHTS, Setting(settings.moe.top_k, settings.moe.hidden_dim)), dtype)
    init_weights(model, seed=0)
    optimizer = build_optimizer(model, Optimizer())
    inputs = inputs_of(2, TOKENS // 2)

    def step() -> None:
        out = model(inputs)
        update(model, optimizer, out.ce + model.terms.objective(out.carry.terms))

    return step, model


def transformers_step(settings: Model, dtype: torch.dtype) -> Work:
    import transformers

    model: Any = transformers.MixtralForCausalLM(mixtral_config(settings)).to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = inputs_of(2, TOKENS // 2).tokens
    return lambda: update(model, optimizer, model(input_ids=tokens, labels=tokens).loss)


def compare(peer: str, ours: Work, theirs: Work, pairs: int, flops: float, peak: float) -> None:
    ours()
    theirs()
    times = []
    for pair in range(pairs):
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
        step, _ = our_step(settings, dtype)
        step()
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45))
        return
    installed = {name: importlib.util.find_spec(name) is not None for name in ("torchtitan", "transformers")}
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
            step, model = our_step(settings, dtype)
            flops = count(model, TOKENS // 2).flops_per_token * TOKENS
            compare("Transformers", step, transformers_step(settings, dtype), options.pairs, flops, peak)
        return
    moe = settings.moe
    flops = 6 * TOKENS * settings.dim * (3 * moe.top_k * moe.hidden_dim + moe.experts)
    x_TD = torch.randn(TOKENS, settings.dim).to(dtype)
    ours = our_layer(settings, dtype, x_TD)
    if installed["torchtitan"] and dtype == torch.bfloat16:
        compare("TorchTitan", ours, torchtitan_layer(settings, dtype, x_TD), options.pairs, flops, peak)
    if installed["transformers"]:
        compare("Transformers", ours, transformers_layer(settings, dtype, x_TD), options.pairs, flops, peak)


if __name__ == "__main__":
    main()
