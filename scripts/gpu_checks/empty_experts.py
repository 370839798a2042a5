"""Experts without tokens, while freshly allocated memory holds NaN.

A kernel that leaves the rows or the gradient of such an expert unwritten returns what was in memory before.
"""

import torch
from torch import Tensor

from gpu_checks.report import Report
from titan_moe.model.gemm import grouped_linear

ENDS = {
    "first and last empty": [0, 5, 9, 9],
    "one has all": [0, 0, 9, 9],
    "no rows": [0, 0, 0, 0],
    "none empty": [2, 4, 7, 9],
}
WIDTHS = [64, 40, 36, 168, 340]  # 36 and 340: rows of bfloat16 that are no multiple of 16 bytes


def poison(report: Report) -> None:
    """Fills memory with NaN and frees it, so that the allocator hands it out next."""
    for size in (1 << 10, 1 << 16, 1 << 22 if report.toy else 1 << 28):
        for _ in range(8 if size < 1 << 20 else 1):
            torch.full((size,), float("nan"), device=report.device, dtype=torch.bfloat16)


def expected(x_RD: Tensor, weight_END: Tensor, ends: list[int]) -> Tensor:
    """The definition: one product per expert, in float64."""
    parts = [x_RD[a:b] @ weight_END[e].t() for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat(parts)


def difference(found: Tensor, wanted: Tensor) -> float:
    if not found.isfinite().all():
        return float("nan")
    return ((found.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def stage(report: Report) -> None:
    report.line("The grouped product against one product per expert in float64: output, and both gradients.")
    report.table(
        "rows per expert",
        "width",
        "type",
        "output",
        "gradient of rows",
        "gradient of weights",
        "of experts without rows",
    )
    generator = torch.Generator().manual_seed(0)
    for label, ends in ENDS.items():
        for width in WIDTHS[:3:2] if report.toy else WIDTHS:
            for dtype, tolerance in {torch.bfloat16: 1e-2, torch.float32: 1e-5}.items():
                name = str(dtype)[6:]
                with report.trial(f"{label}, width {width}, {name}"):
                    x = torch.randn(ends[-1], 64, generator=generator).to(dtype)
                    weight = torch.randn(4, width, 64, generator=generator).to(dtype)
                    incoming = torch.randn(ends[-1], width, generator=generator).to(dtype)
                    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
                    out = expected(exact[0], exact[1], ends)
                    gradients = torch.autograd.grad(out, exact, incoming.double())
                    own = [t.to(report.device).requires_grad_() for t in (x, weight)]
                    offsets = torch.tensor(ends, dtype=torch.int32, device=report.device)
                    poison(report)
                    found = grouped_linear(own[0], own[1], offsets)
                    poison(report)
                    found_gradients = torch.autograd.grad(found, own, incoming.to(report.device))
                    starts = [0, *ends[:-1]]
                    unused = [e for e in range(4) if starts[e] == ends[e]]
                    zero = bool((found_gradients[1][unused] == 0).all())
                    errors = [difference(found, out)]
                    errors += [difference(f, w) for f, w in zip(found_gradients, gradients, strict=True)]
                    cells = [report.equal(error, tolerance) for error in errors]
                    report.row(label, width, name, *cells, report.same("zero" if zero else "not zero", "zero"))
