"""Muon against `torch.optim.Muon`, which knows single matrices only, and what the trainer does with it."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from tests.helpers.steps import DEEPSEEK, VOCABULARY, config_of, mesh_of
from titan_moe.optim import build_optimizer, set_lr
from titan_moe.optim.muon import EPS, A, B, C, orthogonalize, update
from titan_moe.train.build import build_model

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "rows": 0}
STEPS = 4


@pytest.fixture
def _exact_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon without its rounding to bfloat16, as it has no option for that."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x.clone())


def gradients(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=source, dtype=dtype) for _ in range(STEPS)]


def ours(start: Tensor, grads: list[Tensor], **changes: object) -> Tensor:
    parameter, state = nn.Parameter(start.clone()), {}
    with torch.no_grad():
        for grad in grads:
            parameter.grad = grad.clone()
            update(parameter, state, {**OPTIONS, "adjust_lr": "original", **changes})
    return parameter.detach()


def torchs(start: Tensor, grads: list[Tensor], **changes: object) -> Tensor:
    parameter = nn.Parameter(start.clone())
    options = {name: value for name, value in OPTIONS.items() if name != "rows"}
    renamed = {"adjust_lr_fn" if name == "adjust_lr" else name: value for name, value in changes.items()}
    optimizer = torch.optim.Muon([parameter], **{**options, **renamed})
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def assert_same_update(found: Tensor, wanted: Tensor, start: Tensor, tolerance: float) -> None:
    moved = (wanted - start).norm()
    assert moved > 0.01 * start.norm()  # so that the comparison is of updates
    assert (found - wanted).norm() <= tolerance * moved


VARIANTS = [
    {},
    {"nesterov": False},
    {"momentum": 0.5, "ns_steps": 3, "weight_decay": 0.0},
    {"adjust_lr": "match_rms_adamw"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
@pytest.mark.usefixtures("_exact_reference")
def test_a_matrix_is_updated_as_by_torch(shape: tuple[int, int], changes: dict[str, object]) -> None:
    """In float64. The five iterations multiply rounding errors by less than 3.5^5 = 525 each step: 1e-12 is generous."""
    grads = gradients(shape, torch.float64)
    start = grads[0] * 0.1
    assert_same_update(ours(start, grads, **changes), torchs(start, grads, **changes), start, 1e-12)


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_a_float32_matrix_is_updated_as_by_torch(shape: tuple[int, int]) -> None:
    """Both iterate in bfloat16. Batched and single products may sum in another order, which moves a value by one of its 2^-8;
    for the whole matrix such roundings came to 0.02 between bfloat16 and float64."""
    grads = gradients(shape, torch.float32)
    start = grads[0] * 0.1
    assert_same_update(ours(start, grads), torchs(start, grads), start, 0.02)


@pytest.mark.parametrize("shape", [(3, 2, 12, 20), (3, 20, 12)], ids=["gate and up", "down"])
@pytest.mark.usefixtures("_exact_reference")
def test_experts_are_updated_one_by_one(shape: tuple[int, ...]) -> None:
    grads = gradients(shape, torch.float64)
    start = grads[0] * 0.1
    found = ours(start, grads).flatten(0, -3)
    for n, one in enumerate(start.flatten(0, -3)):
        wanted = torchs(one, [grad.flatten(0, -3)[n] for grad in grads])
        assert_same_update(found[n], wanted, one, 1e-12)


@pytest.mark.usefixtures("_exact_reference")
def test_heads_are_updated_one_by_one() -> None:
    """Of wq: 4 heads of 6 rows. The learning rate is a head's too."""
    grads = gradients((24, 16), torch.float64)
    start = grads[0] * 0.1
    found = ours(start, grads, rows=6)
    for head in range(4):
        rows = slice(6 * head, 6 * head + 6)
        wanted = torchs(start[rows], [grad[rows] for grad in grads])
        assert_same_update(found[rows], wanted, start[rows], 1e-12)


def test_constants_are_torchs() -> None:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(orthogonalize(x.unsqueeze(0), 5)[0], _zeropower_via_newtonschulz(x.float(), (A, B, C), 5, EPS))


def test_singular_values_come_near_one() -> None:
    """Jordan's polynomial maps what starts above 0.01 of the Frobenius norm into about [0.68, 1.21] in five steps."""
    x = torch.randn(5, 16, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalize(x, 5))
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_an_expert_without_gradient_only_decays() -> None:
    """Its momentum is 0; the norm's lower bound keeps 0 / 0 away."""
    start = torch.ones(2, 6, 4)
    found = ours(start, [torch.zeros(2, 6, 4)])
    assert torch.equal(found, start * (1 - 0.02 * 0.1))


def test_only_hidden_matrices_are_muons() -> None:
    words = ["--optimizer.name=muon", *DEEPSEEK, "--model.tie_embeddings=false", "--model.qk_norm=true"]
    words += ["--model.moe.shared_gate=true", "--model.qkv_bias=true"]
    config = config_of(words, 1)
    model = build_model(config, VOCABULARY, mesh_of(config, 1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config.optimizer)
    by_adamw = {names[id(p)] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    by_muon = {names[id(p)]: g["rows"] for g in optimizer.param_groups if "momentum" in g for p in g["params"]}
    assert by_adamw | set(by_muon) == set(names.values())
    assert not by_adamw & set(by_muon)
    assert {"embedding", "output.weight", "norm.weight", "layers.1.moe.router.weight"} <= by_adamw
    others = ("embedding", "output.weight", "norm", "router", "shared_gate", "bias")
    assert all(any(part in name for part in others) for name in by_adamw)
    decayed = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decayed["layers.1.moe.shared_gate.weight"] == decayed["layers.1.moe.router.weight"] == 0.1
    assert decayed["layers.0.attention.q_norm.weight"] == decayed["layers.0.attention.wq.bias"] == 0
    assert "layers.0.attention.q_norm.weight" in by_adamw
    for block in ("layers.0", "layers.1"):
        assert [by_muon[f"{block}.attention.{w}.weight"] for w in ("wq", "wk", "wv", "wo")] == [8, 8, 8, 0]
    assert by_muon["layers.1.moe.experts.gate_up"] == by_muon["layers.0.feed_forward.down.weight"] == 0
    together = config_of([*words, "--optimizer.muon.split_heads=false"], 1)
    assert all(group.get("rows", 0) == 0 for group in build_optimizer(model, together.optimizer).param_groups)


@pytest.mark.parametrize(
    ("words", "peak"), [([], 1e-2), (["--optimizer.muon.lr=0.3"], 0.3)], ids=["optimizer.lr", "its own"]
)
def test_the_schedule_scales_every_group_from_its_own_peak(words: list[str], peak: float) -> None:
    config = config_of(["--optimizer.name=muon", *words], 1)
    model = build_model(config, VOCABULARY, mesh_of(config, 1))
    optimizer = build_optimizer(model, config.optimizer)
    for fraction in (0.5, 0.25):
        set_lr(optimizer, fraction)
        assert optimizer.param_groups[0]["lr"] == fraction * 1e-2  # the `lr` of metrics.jsonl
        for group in optimizer.param_groups:
            assert group["lr"] == fraction * (peak if "momentum" in group else 1e-2)


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_matched_updates_have_the_size_of_adamws(shape: tuple[int, int]) -> None:
    """0.2 per element and learning rate (Liu et al.), times the root mean square of the singular values, 0.68 to 1.21."""
    grads = gradients(shape, torch.float64)[:1]
    found = ours(torch.zeros(shape, dtype=torch.float64), grads, adjust_lr="match_rms_adamw")
    rms = (found / OPTIONS["lr"]).square().mean().sqrt()
    assert 0.2 * 0.65 < rms < 0.2 * 1.25
