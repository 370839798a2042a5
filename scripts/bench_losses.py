"""What each term costs on a whole training step: forward, backward, clipping, AdamW.

    python scripts/bench_losses.py                                     medium geometry, 4 layers, every term
    python scripts/bench_losses.py --geometry small --layers 12 --arms sp,cp sp:sample,cp --pairs 15
    python scripts/bench_losses.py --geometry large --layers 2 --arms sp,cp

Steps with the arm's terms on and with all terms off alternate, the order swapped from pair to pair, in one process and on one
model. The ratio is the median of the paired ratios, with a 95% interval from the order statistics of the pairs. `added` times
the terms' own forward and backward pass on the layer's real tensors, over the time of a step without them: a number that
the machine's noise touches much less. Memory is the peak of allocated bytes over a step, on over off.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from titan_moe.config.tables import Model, MoE, Optimizer
from titan_moe.model.init import init_weights
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.train.device import keep_freed_memory, peak_allocated
from titan_moe.train.optimizer import build_optimizer
from torchtitan_ext.carry import empty_carry
from torchtitan_ext.gram import gram_through
from torchtitan_ext.terms import LayerView, Terms, Tokens, WeightedGram

GEOMETRY = {
    "small": Model(dim=576, heads=9, layers=12, moe=MoE(experts=16, top_k=2, hidden_dim=1104)),
    "medium": Model(dim=512, heads=8, layers=4, moe=MoE(experts=64, top_k=4, hidden_dim=672)),
    "large": Model(dim=768, heads=12, layers=2, moe=MoE(experts=96, top_k=6, hidden_dim=1744)),
}
ARMS = [
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
OPTION = {"sp": "sp_method", "cp": "cp_source", "o": "o_variant", "v": "v_variant"}


def terms_of(arm: str, top_k: int) -> Terms:
    """`sp:sample,cp` as sp by sampling and cp."""
    weights, options = {}, {}
    for part in filter(None, arm.split(",")):
        name, _, choice = part.partition(":")
        weights[name] = WEIGHTS[name]
        if choice:
            options[OPTION[name]] = choice
    return Terms(weights, top_k, **options)  # type: ignore[arg-type] # options are the string-valued ones


def use(model: Transformer, terms: Terms) -> None:
    model.terms = terms
    for moe in model.moe_modules():
        moe.terms = terms


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interval(ratios: list[float]) -> tuple[float, float]:
    """95% interval of the median from order statistics (normal approximation of the binomial)."""
    n = len(ratios)
    reach = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return sorted(ratios)[low], sorted(ratios)[high]


class Bench:
    def __init__(self, geometry: str, layers: int, sequences: int, seq: int, dtype: torch.dtype) -> None:
        settings = GEOMETRY[geometry]
        settings = settings.model_copy(update={"layers": layers or settings.layers, "vocab_size": 32000})
        self.top_k, self.dtype = settings.moe.top_k, dtype
        self.model = Transformer(settings, terms_of("", self.top_k), dtype)
        init_weights(self.model, seed=0)
        self.optimizer = build_optimizer(self.model, Optimizer(lr=1e-4))
        tokens = torch.randint(0, 32000, (sequences, seq), generator=torch.Generator().manual_seed(0))
        weights = torch.full(tokens.shape, 1.0 / tokens.numel())
        positions = torch.arange(seq).expand_as(tokens)
        labels, documents = tokens.roll(-1, 1), torch.zeros_like(tokens)
        self.inputs = Inputs(tokens, labels, documents, positions, weights, torch.arange(sequences), torch.tensor(1))
        self.off = terms_of("", self.top_k)

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
        found, offs = [], []
        for pair in range(pairs):
            if pair % 2:
                on, off = self.timed(terms), self.timed(self.off)
            else:
                off, on = self.timed(self.off), self.timed(terms)
            found.append(on / off)
            offs.append(off)
        return found, statistics.median(offs)

    def views(self) -> list[LayerView]:
        """Every MoE layer's view of a real forward pass, detached."""
        seen: list[LayerView] = []

        class Recorder(Terms):
            def add(self, view, carry, layer, tokens):  # type: ignore[no-untyped-def]
                seen.append(view.detach())
                return super().add(view, carry, layer, tokens)

        use(self.model, Recorder({}, self.top_k))
        with torch.no_grad():
            self.model(self.inputs)
        return seen

    def added(self, terms: Terms, views: list[LayerView], repeats: int = 7) -> float:
        """Seconds of the terms' own forward and backward over all layers, less those of no term at all."""
        tokens = Tokens(self.inputs.token_weights, self.inputs.sequences, self.inputs.step)
        incoming_z = [torch.zeros_like(view.z_RF) for view in views]  # what the down projections' backward would give

        def work(active: Terms) -> Callable[[], None]:
            def run() -> None:
                experts = views[0].scores_TE.shape[1]
                width, count = active.previous_width(experts), self.inputs.tokens.numel()
                device = self.inputs.tokens.device
                carry = empty_carry(len(active.names), count, len(views), experts, torch.float32, device, width)
                leaves: list[Tensor] = []
                passed: list[Tensor] = []
                for layer, view in enumerate(views):
                    fresh = view.detach()
                    own = [t.requires_grad_() for t in fresh if isinstance(t, Tensor) and t.is_floating_point()]
                    chosen = active.gram_rows(fresh.rows_TK, layer, tokens)
                    if chosen is not None:
                        z_RF, gram = gram_through(fresh.z_RF, chosen.rows_NK)
                        fresh = fresh._replace(z_RF=z_RF, gram=WeightedGram(gram, chosen.weights_N))
                        passed.append(z_RF)
                    leaves += own
                    carry = active.add(fresh, carry, layer, tokens)
                if active.names:
                    objective = active.objective(carry.terms)
                    incoming = [torch.ones_like(objective), *incoming_z[: len(passed)]]
                    torch.autograd.grad([objective, *passed], leaves, incoming, allow_unused=True)

            return run

        on, off = work(terms), work(self.off)
        on()
        return statistics.median(seconds(on) - seconds(off) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(GEOMETRY), default="medium")
    parser.add_argument("--layers", type=int, default=0, help="0: as the geometry has them here")
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
    print("| term | step ratio | 95% interval | added / step | peak memory |\n|---|---|---|---|---|")
    for arm in options.arms:
        terms = terms_of(arm, bench.top_k)
        added = bench.added(terms, views)
        ratio, span = "", ""
        if options.pairs:
            found, base = bench.ratios(terms, options.pairs)
            low, high = interval(found)
            ratio, span = f"{statistics.median(found):.3f}", f"{low:.3f} to {high:.3f}"
        use(bench.model, terms)
        memory = peak_allocated(bench.step) / bytes_off
        print(f"| {arm} | {ratio} | {span} | {added / base:.4f} | {memory:.3f} |", flush=True)


if __name__ == "__main__":
    main()
