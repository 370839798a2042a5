"""Vocabulary projection and cross-entropy: against float64, and its time and memory with and without our kernel."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_checks.inputs import geometry
from gpu_checks.report import Report
from gpu_checks.timing import gib, median_time, peak_gib
from titan_moe.model.head import chunked_cross_entropy
from torchtitan_ext.ops import select

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """PyTorch's operations in the place of the Triton kernels, in this process."""
    before, select.TRITON_DEVICES = select.TRITON_DEVICES, ()
    try:
        yield
    finally:
        select.TRITON_DEVICES = before


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """PyTorch's cross-entropy of all logits at once."""
    logits = hidden @ weight.to(hidden.dtype).t()
    return (F.cross_entropy(logits.to(weights.dtype), labels, reduction="none") * weights).sum()


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Value, and the gradients of hidden states and weight."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    value = loss(leaves[0], leaves[1], labels, weights)
    return value.detach(), *torch.autograd.grad(value, leaves)


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def stage(report: Report) -> None:
    report.line("Against float64 on the same device, from the same values; then times at the size of a step of medium.")
    report.table("type", "what", "value", "gradient of hidden states", "gradient of weight", "ms", "peak GiB")
    settings = geometry(report, "medium")
    vocabulary = settings.vocab_size if report.toy else 32000
    kinds: dict[str, tuple[Loss, bool]] = {
        "with our kernel": (chunked_cross_entropy, True),
        "PyTorch's operations, in slices": (chunked_cross_entropy, False),
        "PyTorch's operations, all logits": (all_logits, False),
    }

    def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        hidden = torch.randn(tokens, settings.dim, device=report.device).to(dtype)
        weight = torch.randn(vocabulary, settings.dim, device=report.device) * settings.dim**-0.5
        labels = torch.randint(vocabulary, (tokens,), device=report.device)
        return hidden, weight, labels, torch.full((tokens,), 1.0 / tokens, device=report.device)

    for dtype, tolerance in TOLERANCE.items():
        given = inputs(256, dtype)
        exact = (given[0].double(), given[1].to(dtype).double(), given[2], given[3].double())
        wanted = gradients(all_logits, *exact)
        timed = inputs(128 if report.toy else 32768, dtype) if dtype == torch.bfloat16 else None
        for label, (loss, kernels) in kinds.items():
            if kernels and not select.fused(given[0]):
                continue
            with report.trial(label), contextlib.nullcontext() if kernels else without_kernels():
                found = gradients(loss, *given)
                cells = [report.equal(error(a, b), tolerance) for a, b in zip(found, wanted, strict=True)]
                if timed is not None:

                    def work(loss: Loss = loss, timed: tuple[Tensor, ...] = timed) -> object:
                        return gradients(loss, timed[0], timed[1], timed[2], timed[3])

                    ms = median_time(work, report.device, 0.05 if report.toy else 1)
                    cells += [f"{ms:.3f}", gib(peak_gib(work, report.device))]
                report.row(str(dtype)[6:], label, *cells)
