"""The cost of each regularizer in a training step (forward, backward, clipping, AdamW).

    python scripts/bench_losses.py                                     medium geometry, 4 layers, every term
    python scripts/bench_losses.py --geometry small --layers 12 --arms sp,cp sp:sample,cp --pairs 15
    python scripts/bench_losses.py --geometry large --layers 2 --arms sp,cp

Steps with the arm's terms and steps without any alternate, in reversed order every second pair, in one process on one
model. The ratio is the median of the paired ratios, with a 95% interval from their order statistics. `added` is the
time of the terms' forward and backward alone, on tensors of a real forward, divided by the time of a step without
terms; it is much less noisy. Memory is the peak of allocated bytes in a step, with terms / without.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from benchmarking import GEOMETRY, VOCABULARY, inputs_of, interval, seconds
from torch import Tensor, nn

from titan_moe.config.tables import Model, Optimizer
from titan_moe.model.init import init_weights
from titan_moe.model.transformer import Transformer
from titan_moe.optim import build_optimizer
from titan_moe.runtime.allocator import keep_freed_memory
from titan_moe.runtime.device import peak_allocated
from torchtitan_ext.carry import empty_carry
from torchtitan_ext.ops.response import response_through, safe_sqrt
from torchtitan_ext.terms import LayerView, Needs, Setting, Term, TermOptions, Terms, build_terms

ARMS = [
    "none",
    "lb",
    "z",
    "sp",
    "cp",
    "cp:activated",
    "cp:transition",
    "o",
    "o:code",
    "v",
    "erc",
    "sp:sample",
    "sp:sketch",
    "sp,cp",
]
WEIGHTS = {"lb": 1e-2, "z": 1e-3, "sp": 2e-3, "cp": 1e-3, "o": 1e-3, "v": 1e-3, "erc": 1.0}
OPTION = {"sp": "method", "cp": "source", "o": "variant", "v": "variant"}


def terms_of(arm: str, settings: Model) -> Terms:
    """The terms of an arm: `sp:sample,cp` is sp by sampling plus cp; `none` is no term."""
    options: dict[str, dict[str, Any]] = {}
    arm = arm.replace("none", "")
    for part in filter(None, arm.split(",")):
        name, _, choice = part.partition(":")
        options[name] = {"weight": WEIGHTS[name]} | ({OPTION[name]: choice} if choice else {})
    return build_terms(options, Setting(settings.moe.top_k, settings.moe.hidden_dim))


def use(model: Transformer, terms: Terms) -> None:
    """Replaces the terms of a model."""
    model.terms = terms
    for moe in model.moe_modules():
        moe.terms = terms


class Bench:
    def __init__(self, geometry: str, layers: int, sequences: int, seq: int, dtype: torch.dtype) -> None:
        settings = GEOMETRY[geometry]
        settings = settings.model_copy(update={"layers": layers or settings.layers, "vocab_size": VOCABULARY})
        self.settings, self.dtype = settings, dtype
        self.model = Transformer(settings, Terms(), dtype)
        init_weights(self.model, seed=0)
        self.optimizer = build_optimizer(self.model, Optimizer(lr=1e-4))
        self.inputs = inputs_of(sequences, seq)
        self.off = Terms()

    def step(self) -> None:
        out = self.model(self.inputs)
        (out.ce + self.model.terms.objective(out.carry.terms)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, terms: Terms) -> float:
        use(self.model, terms)
        return seconds(self.step)

    def ratios(self, terms: Terms, pairs: int) -> tuple[list[float], float]:
        """Paired ratios, and the median time of a step without terms."""
        ratios, offs = [], []
        for pair in range(pairs):
            if pair % 2:
                on, off = self.timed(terms), self.timed(self.off)
            else:
                off, on = self.timed(self.off), self.timed(terms)
            ratios.append(on / off)
            offs.append(off)
        return ratios, statistics.median(offs)

    def views(self) -> list[LayerView]:
        """What a term sees of every MoE layer in a real forward pass."""
        recorder = Recorder()
        use(self.model, Terms([recorder]))
        with torch.no_grad():
            self.model(self.inputs)
        return recorder.views

    def added(self, terms: Terms, views: list[LayerView], repeats: int = 15) -> list[float]:
        """Seconds of the terms' forward and backward over all layers, minus those of layers without terms.

        For an arm without terms: minus those of layers that return the carry unchanged.
        """
        moes = self.model.moe_modules()
        zero_gradients: dict[str, Tensor] = {}  # stand for the experts' gradients; allocated before timing

        def gradient_of(through: Tensor, name: str) -> Tensor:
            if name not in zero_gradients:
                zero_gradients[name] = torch.zeros_like(through)
            return zero_gradients[name]

        def work(active: Terms, skip: bool = False) -> Callable[[], None]:
            def run() -> None:
                experts, device = views[0].scores_TE.shape[1], self.inputs.tokens.device
                width, measures, count = active.carried_width(experts), len(active.measures), self.inputs.tokens.numel()
                names, layers, sums = len(active.names), len(views), active.sums_width(experts)
                carry = empty_carry(names, count, layers, experts, torch.float32, device, width, measures, sums)
                leaves: list[Tensor] = []
                passed_through: list[Tensor] = []
                incoming: list[Tensor] = []
                for layer, view in enumerate(views if not skip else []):
                    local_view = view.detach()
                    inputs = [t.requires_grad_() for t in local_view if isinstance(t, Tensor) and t.is_floating_point()]
                    assert local_view.z_RF is not None
                    z_RF, observed = active.observe(local_view.z_RF, local_view, LocalRows(local_view))
                    if z_RF is not local_view.z_RF:
                        passed_through.append(z_RF)
                        incoming.append(gradient_of(z_RF, f"z{layer}"))
                    router, gate_up = moes[layer].router.weight, moes[layer].experts.gate_up
                    probes = active.probes(router, layer, view.tokens)
                    if probes is not None:
                        hidden = moes[layer].router.moe.hidden_dim
                        weight, response = response_through(gate_up.flatten(1, 2), probes.vectors_PD, hidden)
                        local_view = local_view._replace(responses_PE=safe_sqrt(response))
                        inputs += [router, gate_up]
                        passed_through.append(weight)
                        incoming.append(gradient_of(weight, f"weight{layer}"))
                    leaves += inputs
                    carry = active.add(local_view, observed, probes, carry)
                if active.names:
                    objective = active.objective(active.complete(carry).terms)
                    ones = torch.ones_like(objective)
                    torch.autograd.grad([objective, *passed_through], leaves, [ones, *incoming], allow_unused=True)

            return run

        on, off = work(terms), work(self.off, skip=not terms.names)
        on()
        return [seconds(on) - seconds(off) for _ in range(repeats)]


class Recorder(Term):
    """Keeps what a term sees of every layer."""

    name = "recorder"
    needs = Needs(activations=True, outputs=True)

    def __init__(self) -> None:
        super().__init__(TermOptions(), Setting(top_k=0))
        self.views: list[LayerView] = []

    def value(self, view: LayerView) -> Tensor:
        self.views.append(view)
        return view.weights_T.new_zeros(())


class LocalRows:
    """Access to rows when all experts are on this rank."""

    local = True

    def __init__(self, view: LayerView) -> None:
        rows, k = view.rows_TK.flatten(), view.rows_TK.shape[1]
        self.tokens_R = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows)) // k)

    def home(self, x_RX: Tensor) -> Tensor:
        return x_RX

    def home_subset(self, x_RX: Tensor, rows_NK: Tensor) -> tuple[Tensor, Tensor]:
        return x_RX, rows_NK

    def to_experts(self, keys_T: Tensor) -> Tensor:
        return keys_T.index_select(0, self.tokens_R)

    def sum_hidden(self, x: Tensor) -> Tensor:
        return x

    def first_hidden(self, width: int) -> int:  # noqa: ARG002 - the interface
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(GEOMETRY), default="medium")
    parser.add_argument("--layers", type=int, default=0, help="0: the number of the geometry")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pairs", type=int, default=7, help="0: only `added` and memory")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    options = parser.parse_args()
    keep_freed_memory()
    bench = Bench(options.geometry, options.layers, options.sequences, options.seq, getattr(torch, options.dtype))
    bench.step()
    base = statistics.median(bench.timed(bench.off) for _ in range(3))
    bytes_off = peak_allocated(bench.step)
    views = bench.views()
    print(
        f"{options.geometry}, {bench.model.settings.layers} layers, {bench.inputs.tokens.numel()} tokens, {options.dtype}"
    )
    print("| term | step ratio | 95% interval | added / step | 95% interval | peak memory |\n|---|---|---|---|---|---|")
    for arm in options.arms:
        terms = terms_of(arm, bench.settings)
        added = bench.added(terms, views)
        ratio, span = "", ""
        if options.pairs:
            ratios, base = bench.ratios(terms, options.pairs)
            low, high = interval(ratios)
            ratio, span = f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"
        use(bench.model, terms)
        memory = peak_allocated(bench.step) / bytes_off
        low_added, high_added = (value / base for value in interval(added))
        added_text = f"{statistics.median(added) / base:.4f} | {low_added:.4f} to {high_added:.4f}"
        print(f"| {arm} | {ratio} | {span} | {added_text} | {memory:.3f} |", flush=True)


if __name__ == "__main__":
    main()
