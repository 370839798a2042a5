"""Three kernels by themselves: sp and a straightforward version, cp for two numbers of experts, erc and the experts'
GEMMs.

    python scripts/bench_kernels.py

All times are of forward and backward.

sp: medium geometry, 2,048 tokens, k = 4, F = 672. The straightforward version gathers the activations to (T, k, F),
normalises, multiplies, squares and averages them, with autograd. Ours computes Gram matrices, and its backward adds to
the gradient that comes from the down projection. Both include that incoming gradient. cp: the closed form, E = 64 and E
= 4,096. erc: one layer, divided by the time of the experts' GEMMs for 2,048 tokens and by the ratio of multiplications,
E^2 / (3 T k).

Medians of alternating runs. Extra memory is the peak of bytes allocated during the work.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmarking import GEOMETRY, inputs_of, interval, seconds
from torch import Tensor, nn

from titan_moe.model.moe import Experts, plan_dispatch
from titan_moe.runtime.allocator import keep_freed_memory
from titan_moe.runtime.device import peak_allocated
from torchtitan_ext.losses import coupling_loss
from torchtitan_ext.ops.gram import gram_through, squared_cosines
from torchtitan_ext.ops.response import coupling_excess, response_through, safe_sqrt
from torchtitan_ext.ops.swiglu import swiglu
from torchtitan_ext.terms import Setting, Tokens, build_terms

TOKENS, K, WIDTH, EXPERTS = 2048, 4, 672, 64
COMPARISONS = 25


def straightforward(z_RF: Tensor, rows_TK: Tensor) -> Tensor:
    """sp by plain PyTorch operations."""
    unit = F.normalize(z_RF[rows_TK], dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    return (cosine.square().sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).square().sum(1)).mean()


def specialization() -> None:
    source = torch.Generator().manual_seed(0)
    ids = torch.rand(TOKENS, EXPERTS, generator=source).topk(K).indices
    rows = plan_dispatch(ids, EXPERTS).rows_TK
    z = torch.randn(TOKENS * K, WIDTH, generator=source).requires_grad_()
    incoming = torch.randn(TOKENS * K, WIDTH, generator=source)

    def ours() -> None:
        through, gram = gram_through(z, rows)
        value = squared_cosines(gram).mean()
        torch.autograd.grad([value, through], z, [torch.ones_like(value), incoming])

    def theirs() -> None:
        through = z.view_as(z)  # the z that the down projection would consume
        value = straightforward(z, rows)
        torch.autograd.grad([value, through], z, [torch.ones_like(value), incoming])

    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(COMPARISONS)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"sp, ours / straightforward: time {ratio:.2f}, extra memory {peak_allocated(ours) / peak_allocated(theirs):.2f}"
    )


def coupling() -> None:
    def work(experts: int) -> Callable[[], object]:
        source = torch.Generator().manual_seed(0)
        scores = [torch.randn(TOKENS, experts, generator=source).softmax(-1).requires_grad_() for _ in range(2)]
        return lambda: torch.autograd.grad(coupling_loss(scores, K), scores)

    few, many = work(64), work(4096)
    few()
    many()
    pairs = [(seconds(many), seconds(few)) for _ in range(COMPARISONS)]
    ratio = statistics.median(a / b for a, b in pairs)
    memory = peak_allocated(many) / (TOKENS * 4096 * 4)
    print(f"cp, E = 4,096 / E = 64: time {ratio:.1f} (64 is linear), memory {memory:.1f} x (T, E) floats")


def expert_router_coupling(geometry: str) -> None:
    settings = GEOMETRY[geometry]
    dim, moe = settings.dim, settings.moe
    source = torch.Generator().manual_seed(0)
    experts = Experts(dim, moe)
    router = (torch.randn(moe.experts, dim, generator=source) / dim**0.5).requires_grad_()
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.02, generator=source)
    ids = torch.rand(TOKENS, moe.experts, generator=source).topk(moe.top_k).indices
    offsets = plan_dispatch(ids, moe.experts).offsets_E
    x = torch.randn(TOKENS * moe.top_k, dim, generator=source).requires_grad_()
    incoming = torch.randn(TOKENS * moe.top_k, dim, generator=source)
    terms, inputs = build_terms({"erc": 1.0}, Setting(moe.top_k)), inputs_of(2, TOKENS // 2)
    tokens = Tokens(inputs.token_weights, inputs.sequences, inputs.step, inputs.sequence_positions)
    incoming_weight = torch.zeros_like(experts.gate_up.flatten(1, 2))

    def erc() -> None:
        probes = terms.probes(router, 0, tokens)
        assert probes is not None
        through, squares = response_through(experts.gate_up.flatten(1, 2), probes.vectors_PD, moe.hidden_dim)
        value = coupling_excess(safe_sqrt(squares), alpha=1.0)
        torch.autograd.grad([value, through], [experts.gate_up, router], [torch.ones_like(value), incoming_weight])

    def products() -> None:
        out = experts.output(swiglu(experts.gate_and_up(x, offsets)[0]), offsets)
        torch.autograd.grad(out, [x, *experts.parameters()], incoming)

    erc()
    products()
    flops_fraction = moe.experts**2 / (3 * TOKENS * moe.top_k)
    ratios = [seconds(erc) / seconds(products) / flops_fraction for _ in range(COMPARISONS)]
    low, high = interval(ratios)
    print(f"erc, {geometry}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) times the experts' GEMMs")


if __name__ == "__main__":
    keep_freed_memory()
    specialization()
    coupling()
    for geometry in GEOMETRY:
        expert_router_coupling(geometry)
