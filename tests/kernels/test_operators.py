"""The kernels as PyTorch operators: schemas, fakes and shapes without storage."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.interpreter import DEVICE
from torchtitan_ext.ops import select
from torchtitan_ext.ops.swiglu import swiglu, swiglu_cosines, swiglu_gram

TOKENS, K, WIDTH = 3, 2, 20
operators = torch.ops.torchtitan_ext


def arguments() -> Iterator[tuple[str, tuple[Tensor | float | None, ...]]]:
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(DEVICE)

    rows = torch.randperm(TOKENS * K, generator=source).reshape(TOKENS, K).to(DEVICE)
    gate_up, dz, y = random(TOKENS * K, 2 * WIDTH), random(TOKENS * K, WIDTH), random(TOKENS * K, WIDTH)
    matrices, scales, gates = random(TOKENS, K, K), torch.ones(TOKENS, K, device=DEVICE), random(TOKENS, K)
    yield "swiglu", (gate_up, gates.flatten())
    yield "swiglu_backward", (gate_up, dz, gates.flatten())
    yield "swiglu_backward", (gate_up, dz, None)
    yield "swiglu_cosines", (gate_up, rows, 0.1, gates)
    yield "swiglu_cosines_backward", (gate_up, rows, dz, matrices, scales, random(TOKENS), gates)
    yield "swiglu_gram", (gate_up, rows, gates)
    yield "swiglu_gram_backward", (gate_up, rows, dz, matrices, gates)
    yield "combine", (y, rows, gates)
    yield "combine", (y, rows, None)
    yield "combine_backward", (random(TOKENS, WIDTH), y, rows, gates)


@pytest.mark.parametrize(("name", "given"), list(arguments()), ids=[name for name, _ in arguments()])
def test_schemas_and_fakes_agree_with_the_kernels(name: str, given: tuple[Tensor | float | None, ...]) -> None:
    torch.library.opcheck(getattr(operators, name).default, given, test_utils=("test_schema", "test_faketensor"))
    layouts = [t.t().contiguous().t() if isinstance(t, Tensor) and t.dim() == 2 else t for t in given]
    found, wanted = getattr(operators, name)(*layouts), getattr(operators, name)(*given)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_shapes_without_storage(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FakeTensors of a device that need not exist, as a compiler traces with, and the meta device."""
    monkeypatch.setattr(select, "TRITON_DEVICES", ("cpu", "cuda", "meta"))
    with FakeTensorMode():
        gate_up = torch.empty(TOKENS * K, 2 * WIDTH, device=device, dtype=torch.bfloat16)
        rows = torch.empty(TOKENS, K, device=device, dtype=torch.int64)
        assert select.fused(gate_up)
        assert swiglu(gate_up).shape == (TOKENS * K, WIDTH)
        z, values, overlaps = swiglu_cosines(gate_up, rows, 0.0)
        assert (z.dtype, values.dtype, values.shape, overlaps.shape) == (
            torch.bfloat16,
            torch.float32,
            (TOKENS,),
            (TOKENS,),
        )
        assert swiglu_gram(gate_up, rows)[1].shape == (TOKENS, K, K)
        assert operators.combine(z, rows, None).shape == (TOKENS, WIDTH)


def test_the_environment_decides_which_tensors_go_to_the_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for kernels, interpret, devices in (
        ("", "0", ("cuda",)),
        ("0", "1", ()),
        ("interpret", "1", ("cpu", "cuda")),
        ("interpret", "0", ("cuda",)),
    ):
        monkeypatch.setenv("TITAN_MOE_KERNELS", kernels)
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        assert select._triton_devices() == devices
    assert "needs the package triton and TRITON_INTERPRET=1" in caplog.text
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert select._triton_devices() == ()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_under_torch_compile(backend: str) -> None:
    given = dict(arguments())
    gate_up, rows, *_ = given["swiglu_cosines"]
    assert isinstance(gate_up, Tensor)

    def objective(gate_up: Tensor) -> Tensor:
        z, values, _ = swiglu_cosines(gate_up, rows, 0.0)  # type: ignore[arg-type]
        again, gram = swiglu_gram(gate_up * 0.5, rows)  # type: ignore[arg-type]
        return values.sum() + z.sin().sum() + (again.sum() + gram.square().sum()) * 0.1 + swiglu(gate_up * 2).sum()

    results = []
    for function in (objective, torch.compile(objective, fullgraph=True, backend=backend)):
        leaf = gate_up.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
