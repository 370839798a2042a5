"""The override for TorchTitan: the model is unchanged, the terms and their gradients equal a computation token by token."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.torchtitan_models import (
    ENTRY,
    KINDS,
    WRAPPED,
    Step,
    batch,
    built,
    checkpointed,
    configuration,
    override,
    step,
)

pytest.importorskip("torchtitan")
if not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"):
    pytest.skip("torchtitan 0.3 needs torch 2.13 or newer", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:.*register_constant")

TERMS = {"lb": 0.1, "z": 1e-2, "sp": 5.0, "cp": 0.3, "o": 10.0, "v": 0.5}
# A bfloat16 has 8 significant bits: one rounding changes a number by at most 2^-9 of it. Gradients of activations are
# bfloat16, and are rounded at every addition and matrix product on their way, in an order that differs.
BFLOAT16 = 2.0**-8


def with_terms(kind: str, terms: dict[str, Any], mode: str = "none", **changes: Any) -> tuple[Step, dict[str, float]]:
    from torchtitan_ext.adapters.torchtitan.record import RECORD

    config = configuration(kind, terms, **changes)
    result = step(*built(config, lambda model: checkpointed(mode, model)), *batch())
    return result, RECORD.metrics()


class ByHand:
    """What MoE layers of a stock model compute, seen from outside, and the terms of it one token after the other."""

    def __init__(self, model: torch.nn.Module) -> None:
        from torchtitan.models.common.moe import GroupedExperts, TokenChoiceTopKRouter

        self.logits: list[Tensor] = []
        self.choices: list[tuple[Tensor, Tensor, Tensor]] = []
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        for module in model.modules():
            if isinstance(module, TokenChoiceTopKRouter):
                module.gate.register_forward_hook(lambda _, __, out: self.logits.append(out.flatten(0, 1)))
                module.register_forward_hook(lambda _, __, out: self.choices.append([x.flatten(0, 1) for x in out]))
            if isinstance(module, GroupedExperts):
                module.register_forward_hook(lambda experts, inputs, y: self.rows.append((self.z(experts, *inputs), y)))

    @staticmethod
    def z(experts: Any, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """SwiGLU activations, one expert after the other."""
        parts = []
        for e, x in enumerate(x_RD.bfloat16().split(counts_E.int().tolist())):
            gate, up = (x @ weight[e].bfloat16().t() for weight in (experts.w1_EFD, experts.w3_EFD))
            parts.append(F.silu(gate) * up)
        return torch.cat(parts)

    def terms(self, labels: Tensor) -> dict[str, Tensor]:
        """Every term, summed over layers."""
        labelled = (labels.flatten() != -100).nonzero().flatten().tolist()
        n, length = len(labelled), labels.shape[1]
        totals = dict.fromkeys(TERMS, torch.zeros(()))
        earlier = None
        for logits_TE, (gates_TK, ids_TK, scores_TE), (z_RF, y_RD) in zip(
            self.logits, self.choices, self.rows, strict=True
        ):
            tokens, k = ids_TK.shape
            experts = logits_TE.shape[1]
            by_token: dict[int, list[int]] = {token: [] for token in range(tokens)}
            pairs = sorted(itertools.product(range(tokens), range(k)), key=lambda pair: int(ids_TK[pair]))
            for row, (token, _) in enumerate(pairs):
                by_token[token].append(row)
            z_RF, y_RD = z_RF.float(), y_RD.float()  # once, so that gradients add up in float32
            for token in labelled:
                z, y = z_RF[by_token[token]], y_RD[by_token[token]]
                totals["z"] = totals["z"] + logits_TE[token].exp().sum().log() ** 2 / n
                for a, b in itertools.permutations(range(k), 2):
                    totals["sp"] = totals["sp"] + F.cosine_similarity(z[a], z[b], dim=0) ** 2 / n
                    onto = (y[a] @ y[b]) / (y[b] @ y[b] + 1e-6) * y[b]
                    totals["o"] = totals["o"] + onto @ onto / n
                if earlier is not None:
                    totals["cp"] = totals["cp"] - scores_TE[token].sort().values[-k:].sum() * earlier[token].sum() / n
            load = torch.bincount(ids_TK[labelled].flatten(), minlength=experts) / (n * k)
            totals["lb"] = totals["lb"] + experts * (load * scores_TE[labelled].mean(0)).sum()
            gates_TE = torch.zeros_like(scores_TE).scatter(1, ids_TK, gates_TK / gates_TK.sum(1, keepdim=True))
            for first in range(0, tokens, length):
                some = [token for token in labelled if first <= token < first + length]
                variance = (gates_TE[some] - gates_TE[some].mean(0)).square().mean(1)
                totals["v"] = totals["v"] - variance.sum() / n
            earlier = scores_TE
        return totals


@pytest.mark.parametrize("kind", KINDS)
def test_terms_and_gradients_equal_those_computed_token_by_token(kind: str) -> None:
    model, loss = built(configuration(kind))
    by_hand = ByHand(model)
    tokens, labels = batch()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = model(tokens, positions=positions)
    cross_entropy, _ = loss(hidden, labels, (labels != -100).sum())
    expected = by_hand.terms(labels)
    # TorchTitan's chunked loss ignores the gradient that enters its backward, so only sums may follow it.
    (cross_entropy + sum(weight * expected[name] for name, weight in TERMS.items())).backward()

    seen, metrics = with_terms(kind, TERMS)
    assert torch.equal(seen.hidden, hidden.detach())
    assert metrics["loss_metrics/cross_entropy"] == cross_entropy.item()
    for name, value in expected.items():
        assert metrics[f"reg/{name}"] == pytest.approx(value.item(), rel=1e-6, abs=1e-9), name
    for name, parameter in model.named_parameters():
        difference = (seen.gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 2 * BFLOAT16, name
    plain = step(*built(configuration(kind)), *batch())
    for name in (name for name in plain.gradients if "inner_experts.w1" in name or "router.gate" in name):
        share = (seen.gradients[name] - plain.gradients[name]).norm() / seen.gradients[name].norm()
        assert share > 20 * BFLOAT16, f"{name}: the terms have too small a gradient for this test to see an error in it"


def assert_same(value: torch.Tensor, right: torch.Tensor, name: str) -> None:
    """Bitwise equal but for the last bit: repeated in one process, the stock model's own gradients differ by up to 3e-7 of the
    largest, in about one run of three on a busy machine."""
    assert (value - right).abs().max() <= 1e-6 * right.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_unchanged_and_recomputation_changes_no_gradient(kind: str) -> None:
    stock, stock_loss = built(configuration(kind))
    plain = step(stock, stock_loss, *batch())
    reference, _ = with_terms(kind, TERMS)
    assert torch.equal(reference.hidden, plain.hidden)
    for mode in ("none", "selective", "full"):
        config = configuration(kind, TERMS)
        model, loss = built(config, lambda model, mode=mode: checkpointed(mode, model))
        assert {name.replace(WRAPPED, "") for name in model.state_dict()} == set(stock.state_dict())
        result = step(model, loss, *batch())
        assert torch.equal(result.hidden, plain.hidden)
        assert torch.equal(result.loss, reference.loss)
        for name, gradient in reference.gradients.items():
            assert_same(result.gradients[name], gradient, f"{mode} {name}")
        # TorchTitan itself counts a recomputed token twice, and halves the counts where they are used.
        unchanged = step(*built(configuration(kind), lambda model, mode=mode: checkpointed(mode, model)), *batch())
        for count, stock_count in zip(result.counts, unchanged.counts, strict=True):
            assert torch.equal(count, stock_count)


def test_measured_terms_have_no_gradient_and_evaluation_has_no_terms() -> None:
    plain = step(*built(configuration("qwen3")), *batch())
    seen, metrics = with_terms("qwen3", {"measure": ["sp", "o", "cp"]})
    assert metrics["reg/sp"] > 0
    assert metrics["reg/o"] > 0
    assert metrics["reg/cp"] < 0
    assert torch.equal(seen.loss, plain.loss)
    for name, gradient in plain.gradients.items():
        assert_same(seen.gradients[name], gradient, name)

    _, without = with_terms("qwen3", {})
    assert set(without) == {
        "loss_metrics/cross_entropy",
        *(f"moe/{n}" for n in ("entropy", "topk_mass", "max_vio", "dead")),
    }

    model, loss = built(configuration("qwen3", TERMS))
    stock, stock_loss = built(configuration("qwen3"))
    tokens, labels = batch()
    values = []
    for one, criterion in ((model.eval(), loss), (stock.eval(), stock_loss)):
        with torch.no_grad():
            hidden = one(tokens, positions=torch.arange(tokens.shape[1]).expand_as(tokens))
            values.append(criterion(hidden, labels)[0])
    assert torch.equal(*values)


def test_microbatches_of_a_step_add_up_and_a_weight_warms_up() -> None:
    from torchtitan_ext.adapters.torchtitan.record import RECORD

    terms = {"sp": {"weight": 0.5, "warmup_steps": 4}, "cp": 0.1}
    whole, once = with_terms("deepseek_v3", terms)
    model, loss = built(configuration("deepseek_v3", terms))
    tokens, labels = batch()
    valid = (labels != -100).sum()
    parts = [step(model, loss, tokens[i : i + 1], labels[i : i + 1], valid) for i in range(2)]
    assert RECORD.metrics() == pytest.approx(once, rel=1e-5)
    assert float(parts[0].loss + parts[1].loss) == pytest.approx(float(whole.loss), rel=1e-6)
    for name, gradient in whole.gradients.items():
        assert (parts[1].gradients[name] - gradient).norm() / gradient.norm() < BFLOAT16, name

    values = []
    for number in (1, 2, 4, 5):
        RECORD.begin(number)
        model.zero_grad()
        values.append(float(step(model, loss, tokens, labels).loss) - RECORD.metrics()["loss_metrics/cross_entropy"])
    sp, cp = (RECORD.metrics()[f"reg/{name}"] for name in ("sp", "cp"))
    expected = [0.5 * factor * sp + 0.1 * cp for factor in (0.25, 0.5, 1.0, 1.0)]
    assert values == pytest.approx(expected, abs=2e-6)  # differences of numbers near 8 in float32


def test_forward_passes_without_a_loss_are_an_error() -> None:
    from torchtitan_ext.adapters.torchtitan.record import RECORD

    model, _ = built(configuration("qwen3", TERMS, layers=1))
    tokens, _ = batch()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    model(tokens, positions=positions)
    with pytest.raises(ValueError, match="two forward passes in training mode before one call of the loss"):
        model(tokens, positions=positions)
    with pytest.raises(ValueError, match="not followed by a call of the loss"):
        RECORD.begin(2)
    model(tokens, positions=positions)


def test_sigmoid_scores_are_normalised() -> None:
    config = configuration("deepseek_v3")
    from torchtitan.models.common.moe import MoE

    for _, moe, _, _ in config.model_spec.model.traverse(MoE.Config):
        moe.router.score_func = "sigmoid"
    override(config, {"cp": 1.0, "lb": 1.0})
    model, loss = built(config)
    seen: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__ == "TokenChoiceTopKRouter":
            module.register_forward_hook(lambda _, __, out: seen.append(out[2].flatten(0, 1)))
    tokens, labels = batch()
    step(model, loss, tokens, labels)
    from torchtitan_ext.adapters.torchtitan.record import RECORD

    labelled = labels.flatten() != -100
    later = (seen[1] / seen[1].sum(1, keepdim=True))[labelled]
    assert RECORD.metrics()["reg/cp"] == pytest.approx(-later.topk(3, 1).values.sum(1).mean().item(), rel=1e-6)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss_and_gradients() -> None:
    from types import SimpleNamespace

    from torchtitan.distributed.compile import apply_compile

    # More layers than the 8 versions of a function that torch.compile makes before it gives up.
    reference, _ = with_terms("qwen3", TERMS, layers=10)
    config = configuration("qwen3", TERMS, layers=10)
    config.compile.enable, config.compile.components, config.compile.backend = True, ["model"], "aot_eager"

    def compiled(model: Any) -> Any:
        dims: Any = SimpleNamespace(tp_enabled=False)
        apply_compile(model, compile_config=config.compile, parallel_dims=dims)
        return model

    result = step(*built(config, compiled), *batch())
    assert torch.equal(result.loss, reference.loss)
    for name, gradient in reference.gradients.items():
        assert (result.gradients[name] - gradient).norm() / gradient.norm() < 2 * BFLOAT16, name


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"spp": 1.0}, "'spp' is no term; choose from lb, z, sp, cp, o, v and measure"),
        ({"erc": 1.0}, "erc multiplies each expert's gate weights by noisy router rows"),
        ({"sp": {"wight": 1.0}}, "sp.wight = 1.0: Extra inputs are not permitted"),
        ({"sp": -1}, "sp.weight = -1.0: Input should be greater than or equal to 0"),
        ({"cp": {"weight": 1.0, "source": "none"}}, "cp.source = 'none': Input should be"),
        (
            {"sp": {"weight": 1.0, "method": "sample"}},
            "sp.method = 'sample': its random numbers are keyed by sequences",
        ),
        ({"o": {"weight": 1.0, "match_lb": True}}, "o.match_lb: its scale must be saved with the run"),
    ],
)
def test_unknown_options_are_refused_in_one_line(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="torchtitan") as caught:
        configuration("qwen3", terms)
    assert str(caught.value).startswith(f"{ENTRY}: {message}")
    assert "\n" not in str(caught.value)


def test_models_and_layouts_that_are_not_supported_are_refused() -> None:
    from types import SimpleNamespace

    from torchtitan.models.gpt_oss.config_registry import gpt_oss_debugmodel
    from torchtitan.models.qwen3.config_registry import qwen3_debugmodel

    from torchtitan_ext.adapters.torchtitan.training import refuse

    config = gpt_oss_debugmodel()
    with pytest.raises(ValueError, match="GptOssGroupedExperts has a forward of its own"):
        override(config, {"sp": 1.0})

    dense = qwen3_debugmodel()
    override(dense, {"sp": 1.0})
    loss = dense.loss.build(compile_config=dense.compile)
    with pytest.raises(ValueError, match="no MoE layer"):
        _ = loss.set_lm_head(torch.nn.Identity()) or loss(
            torch.randn(1, 24, 8, requires_grad=True), torch.zeros(1, 24, dtype=torch.int64)
        )

    with pytest.raises(ValueError, match=r"cp\.weight: cp couples neighbouring MoE layers, the model has one"):
        with_terms("qwen3", {"cp": 1.0}, layers=1)

    one = SimpleNamespace(pp=1, tp=1, cp=1, spmd_backend="spmd_types")
    config = {
        "training": {"disable_cuda_graphs": True},
        "compile": {"enable": False, "components": ["model", "loss"]},
        "activation_checkpoint": {},
    }
    refuse(one, config)
    for changed, message in (
        ({"pp": 2}, "pipeline_parallel_degree = 2"),
        ({"tp": 2}, "tensor_parallel_degree = 2"),
        ({"cp": 2}, "context_parallel_degree = 2"),
        ({"spmd_backend": "full_dtensor"}, "full_dtensor"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse(SimpleNamespace(**{**vars(one), **changed}), config)
    with pytest.raises(ValueError, match="CUDA graphs"):
        refuse(one, {**config, "training": {"disable_cuda_graphs": False}})
    with pytest.raises(ValueError, match="together with activation checkpointing"):
        refuse(one, {**config, "compile": {"enable": True, "components": ["model"]}})
