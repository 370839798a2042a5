"""SwiGLU with cosines or Gram matrices in one kernel, compared with PyTorch's operations, which define it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.interpreter import DEVICE
from torchtitan_ext.ops import select
from torchtitan_ext.ops.gram import squared_cosines, token_gram
from torchtitan_ext.ops.swiglu import swiglu, swiglu_cosines, swiglu_gram

TOKENS = 7  # does not fill a tile
SIZES = [(1, 40), (2, 72), (6, 168), (8, 33)]
CASES = [(k, width, dtype) for k, width in SIZES for dtype in (torch.float32, torch.bfloat16)]
LARGE = [
    (k, width, dtype)
    for k in (1, 2, 3, 4, 6, 8, 20)
    for width in (680, 1432)
    for dtype in (torch.float32, torch.bfloat16)
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in LARGE]  # type: ignore[misc]


def problem(k: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_up, rows, token weights, dz; with a token of zero rows, one zero row, and a token without weight."""
    source = torch.Generator().manual_seed(k)
    gate_up = torch.randn(TOKENS * k, 2 * width, generator=source)
    rows = torch.randperm(TOKENS * k, generator=source).reshape(TOKENS, k)
    gate_up[rows[1]] = 0
    gate_up[rows[2, 0]] = 0
    weights = torch.rand(TOKENS, generator=source)
    weights[3] = 0
    dz = torch.randn(TOKENS * k, width, generator=source).to(dtype)
    return gate_up.to(dtype).to(DEVICE), rows.to(DEVICE), weights.to(DEVICE), dz.to(DEVICE)


class Rounded(torch.autograd.Function):
    """To the dtype in which the kernels store z and back. Gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG004 - torch's signature
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


def plain(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    """z in float32 (or float64), rounded once to dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    z: Tensor = Rounded.apply(F.silu(gate) * up, dtype)
    return z


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """The largest difference is at most tolerance times the largest entry."""
    assert found.isfinite().all()
    difference = (found.double() - wanted.double()).abs().max()
    assert difference <= tolerance * wanted.double().abs().max(), difference


# Float32: sums in another order, and exp, which differs in the last bit. Of bfloat16 results, one unit in the last place.
STORED = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8}
# Float32 results that come from z: where exp differs in its last bit, a bfloat16 z may round the other way.
DERIVED = {torch.float32: 3e-6, torch.bfloat16: 6e-5}


@pytest.mark.parametrize(("k", "width", "dtype"), CASES)
def test_cosines_and_gradients_equal_pytorch(k: int, width: int, dtype: torch.dtype) -> None:
    gate_up, rows, weights, dz = problem(k, width, dtype)
    leaf, exact = gate_up.clone().requires_grad_(), gate_up.float().requires_grad_()
    for floor in (0.0, 1.0 / width):
        z, values, overlaps = swiglu_cosines(leaf, rows, floor)
        wanted_z = plain(exact, dtype)
        gram = token_gram(wanted_z, rows, scaled=True)
        close(z, wanted_z, STORED[dtype])
        close(values, squared_cosines(gram, floor), 2 * DERIVED[dtype])
        close(overlaps, squared_cosines(gram), 2 * DERIVED[dtype])
        wanted = (squared_cosines(gram, floor) * weights).sum() + (wanted_z * dz.float()).sum()
        found = (values * weights).sum() + (z * dz).float().sum()
        (slopes,), (wanted_slopes,) = torch.autograd.grad(found, leaf), torch.autograd.grad(wanted, exact)
        assert slopes.dtype == dtype
        close(slopes, wanted_slopes, 2 * STORED[dtype])


@pytest.mark.parametrize(("k", "width", "dtype"), CASES)
def test_gram_matrices_and_gradients_equal_pytorch(k: int, width: int, dtype: torch.dtype) -> None:
    gate_up, rows, _, dz = problem(k, width, dtype)
    leaf, exact = gate_up.clone().requires_grad_(), gate_up.float().requires_grad_()
    z, gram = swiglu_gram(leaf, rows)
    wanted_z = plain(exact, dtype)
    wanted_gram = token_gram(wanted_z, rows)
    close(gram, wanted_gram, DERIVED[dtype])
    part = torch.randn(gram.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) / width**0.5
    found, wanted = (gram * part).sum() + (z * dz).float().sum(), (wanted_gram * part).sum() + (wanted_z * dz).sum()
    (slopes,), (wanted_slopes,) = torch.autograd.grad(found, leaf), torch.autograd.grad(wanted, exact)
    close(slopes, wanted_slopes, 2 * STORED[dtype])


@pytest.mark.parametrize("kind", ["alone", "cosines", "Gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "width"), [(2, 72), (6, 33)])
def test_gate_weights_scale_z_and_are_not_seen_by_the_cosines(
    kind: str, k: int, width: int, dtype: torch.dtype
) -> None:
    """z times gates comes back, the sums are of z without them, and the gates' gradient is <dz, z>."""
    gate_up, rows, weights, dz = problem(k, width, dtype)
    gates = torch.rand(TOKENS, k, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    gates[4, 0] = 0
    results = []
    for exact in (False, True):
        leaf = (gate_up.float() if exact else gate_up).clone().requires_grad_()
        gate = gates.clone().requires_grad_()
        gates_R = torch.zeros(TOKENS * k, device=DEVICE).scatter(0, rows.flatten(), gate.flatten())
        seen: Tensor | None = None
        if exact:
            z = plain(leaf, dtype)
            if kind != "alone":
                gram = token_gram(z, rows, scaled=kind == "cosines")
                seen = squared_cosines(gram) if kind == "cosines" else gram.sum((1, 2)) / width
            z = z * gates_R.unsqueeze(1)
        elif kind == "alone":
            z = swiglu(leaf, gates_R)
        elif kind == "cosines":
            z, seen, _ = swiglu_cosines(leaf, rows, 0.0, gate)
        else:
            z, gram = swiglu_gram(leaf, rows, gate)
            seen = gram.sum((1, 2)) / width
        objective = (z.float() * dz.float()).sum()
        measured_only = torch.autograd.grad(objective, gate, retain_graph=True)[0]
        if seen is not None:
            objective = objective + (seen * weights).sum()
        results.append((z, *torch.autograd.grad(objective, (leaf, gate)), measured_only))
    for number, (found, wanted) in enumerate(zip(*results, strict=True)):
        # Gradients of gate weights are float32 sums of z in its own type.
        close(found, wanted, (STORED, STORED, DERIVED, DERIVED)[number][dtype] * (1, 2, 2, 2)[number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (37, 67), (16, 64)])
def test_swiglu_alone_equals_pytorch(rows: int, width: int, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    gate_up = (3 * torch.randn(rows, 2 * width, generator=source)).to(dtype).to(DEVICE)
    dz = torch.randn(rows, width, generator=source).to(dtype).to(DEVICE)
    leaf, exact = gate_up.clone().requires_grad_(), gate_up.float().requires_grad_()
    z, wanted = swiglu(leaf), plain(exact, dtype)
    assert z.grad_fn is not None
    assert "_FusedSwiGLU" in z.grad_fn.name()
    z.backward(dz)
    wanted.backward(dz.float())
    assert leaf.grad is not None
    assert exact.grad is not None
    if rows:
        close(z, wanted, STORED[dtype])
        close(leaf.grad, exact.grad, 2 * STORED[dtype])
    else:
        assert z.shape == (0, width)
        assert leaf.grad.shape == gate_up.shape


FACTORS = [1e-20, 1e19, 1e-37, 1e35, (1e-20, 1.0, 1e19), (0.0, 1e-20, 1e-25)]


@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_do_not_depend_on_the_length_of_activations(dtype: torch.dtype, factor: Any) -> None:
    """As test_range.py has it for PyTorch's operations. z is proportional to the up projection; the first token keeps
    its length, in a tile with the others."""
    k, width = 3, 35
    scale = (
        2.0**-20 if factor != 1e35 else 2.0**20
    )  # a weight that keeps gradients of order 1 / factor inside the range
    gate_up, rows, weights, _ = problem(k, width, dtype)
    factors = torch.tensor(factor, dtype=torch.float64, device=DEVICE).expand(k)
    factors = torch.where(factors > 0, torch.exp2(factors.log2().round()), 0.0)
    by_row = torch.ones(TOKENS * k, dtype=torch.float64, device=DEVICE)
    by_row[rows[1:].flatten()] = factors.repeat(TOKENS - 1)
    leaf = gate_up.double()
    leaf[:, width:] *= by_row[:, None]
    leaf = leaf.to(dtype).requires_grad_()
    z, values, _ = swiglu_cosines(leaf, rows, 0.0)
    # The definition: float64, rows of ordinary length.
    unit = z.detach().double() / torch.where(by_row > 0, by_row, 1.0)[:, None]
    unit.requires_grad_()
    wanted = squared_cosines(token_gram(unit, rows))
    # A subnormal z has lost bits, and the unit of a float32 product of exponents near the limit is 2^-149.
    close(values, wanted, 2 * DERIVED[torch.float32])
    (d_unit,) = torch.autograd.grad((wanted * weights).sum() * scale, unit)
    dz = d_unit / torch.where(by_row > 0, by_row, 1.0)[:, None]
    gate, up = leaf.detach().double().requires_grad_().chunk(2, dim=-1)
    both = torch.cat([gate, up], dim=1).detach().requires_grad_()
    (wanted_slopes,) = torch.autograd.grad(plain(both, torch.float64), both, dz)
    (slopes,) = torch.autograd.grad((values * weights).sum() * scale, leaf)
    error = (slopes.double() - wanted_slopes).abs()
    for half in (slice(0, width), slice(width, 2 * width)):
        largest = wanted_slopes[:, half].abs().amax(1, keepdim=True)
        assert (error[:, half] <= 4 * STORED[dtype] * largest + torch.finfo(dtype).tiny).all()


def test_nan_and_infinity_reach_the_value() -> None:
    gate_up, rows, _, _ = problem(2, 20, torch.float32)
    for bad in (float("nan"), float("inf")):
        broken = gate_up.clone()
        broken[rows[5, 1], 3] = bad
        _, values, _ = swiglu_cosines(broken, rows, 0.0)
        assert values[5].isnan()
        assert values[[0, 1, 2, 3, 4, 6]].isfinite().all()


def test_second_derivatives_are_refused() -> None:
    """They would silently be 0 otherwise."""
    gate_up, rows, _, _ = problem(2, 8, torch.float32)
    leaf = gate_up.requires_grad_()
    for result in (swiglu(leaf), swiglu_cosines(leaf, rows, 0.0)[1], swiglu_gram(leaf, rows)[1]):
        (slopes,) = torch.autograd.grad(result.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slopes.sum().backward()


def test_float64_and_transforms_use_pytorch() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    assert select.fused(x.float())
    assert not select.fused(x)
    assert swiglu(x).dtype == torch.float64
    slopes = torch.func.grad(lambda x: swiglu(x).sum())(x.float())
    leaf = x.float().requires_grad_()
    swiglu(leaf).sum().backward()
    torch.testing.assert_close(slopes, leaf.grad)
