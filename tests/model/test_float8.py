"""float8 products: their rounding against one written out here, and which layers have them."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe.config.load import load_config
from titan_moe.config.tables import Float8
from titan_moe.errors import UserError
from titan_moe.model.float8 import Float8Product, use_float8
from titan_moe.model.float8_experts import float8_grouped_linear
from titan_moe.model.gemm import Linear, grouped_linear, linear
from titan_moe.model.terms import terms_of
from titan_moe.model.transformer import Transformer

CPU = torch.device("cpu")


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None = None) -> Tensor:
    """x / scale in float8, times scale: one scale that brings the largest value to the type's."""
    high = x.abs().double()
    largest = high.amax() if dim is None else high.amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / largest.clamp(min=1e-12)).float()
    return (x.float() * scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float() / scale


def test_tensorwise_is_the_rounding_of_both_sides() -> None:
    """One bfloat16 rounding of the result is 2^-8 relative; its sum is taken in float32 by both."""
    torch.manual_seed(0)
    x = torch.randn(24, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(48, 32, dtype=torch.float32, requires_grad=True)
    out = Float8Product("tensorwise", emulate=True)(x, weight)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x8, weight8 = rounded(x.detach(), e4m3), rounded(weight.detach().bfloat16(), e4m3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), x8 @ weight8.T, rtol=2**-8, atol=1e-4)
    grad = torch.randn_like(out)
    out.backward(grad)
    grad8 = rounded(grad, e5m2)
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad.float(), grad8 @ weight8, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(weight.grad, grad8.T @ x8, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_every_recipe_is_near_the_plain_product(recipe: str) -> None:
    """Both factors lose at most 2^-4 of each value (three mantissa bits, once more for scales of powers of two), so a
    sum of n products of order 1 moves by about 2^-4 sqrt(2 n); three times that."""
    torch.manual_seed(0)
    x, weight = torch.randn(16, 32, dtype=torch.bfloat16), torch.randn(16, 32)
    difference = (Float8Product(recipe, emulate=True)(x, weight) - linear(x, weight)).abs().max()
    assert 0 < difference < 3 * 2**-4 * (2 * 32) ** 0.5


def test_which_layers() -> None:
    words = ["--training.dtype=bfloat16", "--model.moe.shared_experts=1", "--model.moe.first_dense_layers=1"]
    config = load_config("debug", [*words, "--model.tie_embeddings=false", "--float8.enable=true"])
    model = Transformer(config.model.model_copy(update={"vocab_size": 64}), terms_of(config), torch.bfloat16)
    use_float8(model, config.float8, CPU)
    found = {
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear) and isinstance(module.multiply, Float8Product)
    }
    attention = {f"layers.{n}.attention.{w}" for n in range(4) for w in ("wq", "wk", "wv", "wo")}
    dense = {f"layers.0.feed_forward.{w}" for w in ("gate", "up", "down")}
    shared = {f"layers.{n}.moe.shared.{w}" for n in range(1, 4) for w in ("gate", "up", "down")}
    assert found == attention | dense | shared


OFFSETS = torch.tensor([5, 5, 24, 30], dtype=torch.int32)


def grouped_inputs() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(30, 32, generator=source) * torch.logspace(-6, 6, 30).unsqueeze(1)
    x[3] = 0
    weight, grad = torch.randn(4, 48, 32, generator=source), torch.randn(30, 48, generator=source).bfloat16()
    return x.bfloat16().requires_grad_(), weight.requires_grad_(), grad


def power_of_two(x: Tensor, dim: int) -> Tensor:
    """float8 rounding of x with one scale per row, a power of two that brings the row's largest value to 224 ... 448."""
    largest = x.abs().double().amax(dim, keepdim=True).clamp(min=1e-30)
    scale = torch.exp2((largest / 448).log2().floor() + 1)
    return ((x.double() / scale).float().to(torch.float8_e4m3fn).double() * scale).float()


def test_grouped_product_is_the_rounding_of_both_sides() -> None:
    """A product of rounded rows, one bfloat16 rounding of the result; the rows' gradient alike, the weights' without float8.
    Experts without rows have gradient 0."""
    x, weight, grad = grouped_inputs()
    out = float8_grouped_linear(x, weight, OFFSETS)
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), grad)
    with torch.no_grad():
        x8, w8 = power_of_two(x, 1), power_of_two(weight.bfloat16(), 2)
        grad8, transposed8 = power_of_two(grad, 1), power_of_two(weight.bfloat16().transpose(1, 2), 2)
    for e, (start, end) in enumerate(zip([0, 5, 5, 24], [5, 5, 24, 30], strict=True)):
        part = slice(start, end)
        torch.testing.assert_close(out[part].float(), x8[part] @ w8[e].T, rtol=2**-7, atol=1e-4)
        torch.testing.assert_close(grad_x[part].float(), grad8[part] @ transposed8[e].T, rtol=2**-7, atol=1e-4)
        wanted = grad[part].float().T @ x[part].float()
        error = (grad_weight[e] - wanted).abs().max()
        assert error <= 2**-8 * wanted.abs().max() if end > start else error == 0


def test_grouped_product_on_a_gpu_has_the_layout_that_pytorch_asks_for() -> None:
    """Traced without a GPU: PyTorch checks types, strides and scales of its scaled grouped product, and gives the shapes."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(function)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.no_grad(), Record():
        x = torch.empty(30, 32, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(4, 48, 32, device="cuda", dtype=torch.bfloat16)
        out = float8_grouped_linear(x, weight, torch.empty(4, device="cuda", dtype=torch.int32))
    assert (out.shape, out.dtype) == ((30, 48), torch.bfloat16)
    assert torch.ops.aten._scaled_grouped_mm.default in calls


def test_experts_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--training.dtype=bfloat16", "--float8.enable=true"]
    for more, wanted in (([], grouped_linear), (["--float8.experts=true"], float8_grouped_linear)):
        config = load_config("debug", [*words, *more])
        model = Transformer(config.model.model_copy(update={"vocab_size": 64}), terms_of(config), torch.bfloat16)
        use_float8(model, config.float8, CPU)
        assert all(moe.experts.multiply is wanted for moe in model.moe_modules())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "L40S")
    with pytest.raises(UserError, match=r"float8\.experts: L40S has no scaled grouped product; set it to false"):
        use_float8(model, config.float8, torch.device("cuda", 0))


def test_off_changes_nothing() -> None:
    model = nn.ModuleList([Linear(16, 16)])
    use_float8(model, Float8(), CPU)
    (module,) = model
    assert isinstance(module, Linear)
    assert module.multiply is linear
