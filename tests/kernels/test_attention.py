"""Rotary positions by the kernel, and the norm that a GPU computes on bfloat16 directly, against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.interpreter import DEVICE
from titan_moe.model.attention import RMSNorm, rotary_tables, rotate
from torchtitan_ext.ops import select

SHAPES = [(2, 3, 4, 16, 16), (1, 5, 3, 12, 8), (1, 2, 33, 64, 64), (1, 2, 1, 10, 10), (0, 4, 2, 8, 8)]
# Two products and a sum in float32; of bfloat16 one rounding.
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "seq", "heads", "width", "turned"), SHAPES)
def test_rotation_and_its_gradient_equal_float64(
    batch: int, seq: int, heads: int, width: int, turned: int, dtype: torch.dtype
) -> None:
    source = torch.Generator().manual_seed(0)
    x, probe = (torch.randn(batch, seq, heads, width, generator=source).to(dtype).to(DEVICE) for _ in range(2))
    positions = torch.randint(10_000, (batch, seq), generator=source).to(DEVICE)
    tables = rotary_tables(positions, turned, 1e4, torch.float32)
    results = []
    for wide in (False, True):
        leaf = (x.double() if wide else x).clone().requires_grad_()
        assert select.fused(leaf) != wide
        out = rotate(leaf, *(table.double() if wide else table for table in tables))
        results.append((out, *torch.autograd.grad(out, leaf, probe.to(out.dtype))))
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == dtype
        # An output of size 1 can be the difference of two products of size 3.
        assert (found.double() - wanted).abs().lt(TOLERANCE[dtype] * (wanted.abs() + 4)).all()


def test_a_compiler_sees_the_operations_of_the_rotation() -> None:
    """Which it joins with their neighbours; the kernel would stand between them."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    x = torch.randn(1, 2, 2, 8, device=DEVICE)
    tables = rotary_tables(torch.arange(2, device=DEVICE)[None], 8, 1e4, torch.float32)
    torch._dynamo.reset()
    found = torch.compile(lambda x: rotate(x, *tables), backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, rotate(x, *tables))
    assert len(graphs) == 1
    assert "torchtitan_ext" not in graphs[0]


def test_the_norm_of_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    """What RMSNorm leaves to PyTorch on a GPU, F.rms_norm of bfloat16, is its definition, gradients too."""
    source = torch.Generator().manual_seed(0)
    norm = RMSNorm(24, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x, probe = (torch.randn(6, 24, generator=source).bfloat16() for _ in range(2))
    results = []
    for direct in (True, False):
        leaf = x.clone().requires_grad_()
        out = F.rms_norm(leaf, (24,), norm.weight.to(x.dtype), norm.eps) if direct else norm(leaf)
        results.append((out, *torch.autograd.grad(out, (leaf, norm.weight), probe)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-6)
