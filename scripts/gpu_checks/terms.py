"""Every loss term and variant, values and gradients: this device in three types against the CPU in float64.

Each term is differentiated alone, so that the cross-entropy's gradient cannot hide an error of it. Rounding moves a
token whose k-th and (k+1)-th score are close to another expert, and then every number differs. So the chosen experts of
the reference are given to the other runs, tokens with close scores carry no label, and how many tokens would have moved
is counted apart.
"""

import contextlib
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gpu_checks.inputs import moved, random_inputs
from gpu_checks.report import Report
from titan_moe.config.tables import Model, MoE
from titan_moe.model import moe as moe_module
from titan_moe.model.init import init_weights
from titan_moe.model.transformer import Inputs, Transformer
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.terms import REGISTRY, Setting, build_terms

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
CLOSE = 0.02
"""Tokens whose k-th and (k+1)-th score are nearer than this carry no label; bfloat16 hidden states move scores by less."""

MOE = MoE(experts=8, top_k=3, hidden_dim=48, shared_experts=1)
MODEL = Model(dim=48, heads=4, kv_heads=2, qk_norm=True, layers=3, vocab_size=128, moe=MOE)
MODELS = {
    "softmax": MODEL,
    "sigmoid": MODEL.model_copy(
        update={"moe": MOE.model_copy(update={"score": "sigmoid", "normalize_topk": True, "route_scale": 2.5})}
    ),
    "first layer dense, own output matrix": MODEL.model_copy(
        update={"moe": MOE.model_copy(update={"first_dense_layers": 1}), "tie_embeddings": False}
    ),
    "documents apart": MODEL.model_copy(update={"document_mask": True}),
}


class Outcome(NamedTuple):
    value: float
    gradients: dict[str, Tensor]
    routing: list[Tensor]


def variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Label, name and options of every registered term: its defaults, then every other value of each choice."""
    for name, term in REGISTRY.items():
        yield name, name, {"weight": 1.0}
        for field, info in term.Options.model_fields.items():
            if typing.get_origin(info.annotation) is Literal:
                values = [value for value in typing.get_args(info.annotation) if value != info.default]
            elif info.annotation is bool and field != "match_lb":  # that one is a factor, set by the trainer
                values = [not info.default]
            else:
                continue
            for value in values:
                yield f"{name}, {field} = {str(value).lower()}", name, {"weight": 1.0, field: value}


def build(
    settings: Model, name: str | None, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> Transformer:
    """A model with one term, or with none; the same weights on every device and in every type."""
    terms = build_terms({} if name is None else {name: options}, Setting(settings.moe.top_k, settings.moe.hidden_dim))
    model = Transformer(settings, terms, dtype)
    init_weights(model, seed=0)
    return model.to(device)


def force(model: Transformer, routing: list[Tensor]) -> None:
    """Makes every router choose these experts (T, k), in this order: the balancing bias enters only the choice, so one
    per token that is far above every score decides it."""
    for moe, ids_TK in zip(model.moe_modules(), routing, strict=True):
        order_K = torch.arange(ids_TK.shape[1], 0, -1, dtype=torch.float32).expand(ids_TK.shape)
        bias_TE = torch.zeros(len(ids_TK), moe.router.moe.experts).scatter(1, ids_TK, 1e3 * order_K)
        moe.router.expert_bias = bias_TE.to(moe.router.expert_bias.device)


@contextlib.contextmanager
def bias_per_token() -> Iterator[None]:
    """Lets the model take such a bias where a kernel, if there is one, chooses the experts: it takes one bias for all."""
    kernel = getattr(moe_module, "choose_experts", None)

    def choose(logits_TE: Tensor, bias: Tensor, top_k: int, score: str) -> Tensor:
        assert kernel is not None
        chosen: Tensor = kernel(logits_TE, bias, top_k, score) if bias.dim() == 1 else bias.topk(top_k, dim=-1).indices
        return chosen

    if kernel is not None:
        vars(moe_module)["choose_experts"] = choose
    try:
        yield
    finally:
        if kernel is not None:
            vars(moe_module)["choose_experts"] = kernel


def run(model: Transformer, inputs: Inputs) -> Outcome:
    """The cross-entropy, or the model's terms if it has some, with gradients, on the CPU in float64."""
    ce, carry, routing = model.evaluate(inputs)
    objective = model.terms.objective(carry.terms) if model.terms.names else ce
    if objective.requires_grad:
        objective.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(objective.item(), gradients, [ids.cpu() for ids in routing])


def labelled(inputs: Inputs, model: Transformer) -> Inputs:
    """The inputs without labels on tokens with close scores in some layer."""
    scores: list[Tensor] = []
    hooks = [
        moe.router.register_forward_hook(lambda *given: scores.append(given[-1][0].scores_TE))
        for moe in model.moe_modules()
    ]
    with torch.no_grad():
        model.evaluate(inputs)
    for hook in hooks:
        hook.remove()
    k = model.settings.moe.top_k
    best_LTK = torch.stack(scores).topk(k + 1, dim=-1).values
    clear_T = (best_LTK[..., k - 1] - best_LTK[..., k] > CLOSE).all(0)
    weights = clear_T.view(inputs.tokens.shape).to(inputs.token_weights.dtype)
    return inputs._replace(token_weights=weights / weights.sum())


def gradient_error(found: Outcome, wanted: Outcome) -> float:
    """Norm of the difference of all gradients over their norm."""
    difference = sum(((found.gradients[n] - g).square().sum().item() for n, g in wanted.gradients.items()), 0.0)
    norm = sum((g.square().sum().item() for g in wanted.gradients.values()), 0.0)
    return (difference / norm) ** 0.5 if norm else difference**0.5


def moved_tokens(model: Transformer, inputs: Inputs, wanted: list[Tensor]) -> tuple[int, int]:
    """Pairs of token and layer that choose other experts when they are free to: all, and those with a label."""
    for moe in model.moe_modules():
        moe.router.expert_bias = torch.zeros(moe.router.moe.experts, device=inputs.tokens.device)
    with torch.no_grad():
        routing = model.evaluate(inputs)[2]
    pairs = zip(routing, wanted, strict=True)
    moved_LT = torch.stack([(a.cpu().sort(1).values != b.sort(1).values).any(1) for a, b in pairs])
    return int(moved_LT.sum()), int((moved_LT & (inputs.token_weights.flatten().cpu() > 0)).sum())


def check(report: Report, label: str, settings: Model, name: str | None, options: dict[str, Any]) -> None:
    """A row: this device in every type against the CPU in float64."""
    reference = build(settings, name, options, torch.float64, CPU)
    inputs = random_inputs(settings.vocab_size, 4, 32 if report.toy else 64, documents=2)
    inputs = labelled(inputs._replace(token_weights=inputs.token_weights.double()), reference)
    wanted = run(reference, inputs)
    cells, free = [], []

    def outcome(dtype: torch.dtype, device: torch.device) -> tuple[Outcome, tuple[int, int]]:
        model = build(settings, name, options, dtype, device)
        weights = inputs.token_weights.to(accumulation_dtype(dtype))
        own = moved(inputs._replace(token_weights=weights), device)
        force(model, wanted.routing)
        with bias_per_token():
            found = run(model, own)
        if not all(map(torch.equal, found.routing, wanted.routing)):
            raise RuntimeError("the model did not choose the experts that it was given")
        return found, moved_tokens(model, own, wanted.routing)

    for dtype, tolerance in TOLERANCE.items():
        found, (other_experts, labelled_ones) = outcome(dtype, report.device)
        if dtype != torch.bfloat16 and labelled_ones:  # their scores are further apart than rounding
            free.append(f"{other_experts}, with a label {report.same(labelled_ones, 0)}")
        else:
            free.append(str(other_experts))
        value = abs(found.value - wanted.value) / max(abs(wanted.value), 1e-30)
        if dtype == torch.bfloat16:
            cpu = gradient_error(outcome(dtype, CPU)[0], wanted)
            cells.append(report.equal(value, tolerance))
            cells.append(f"{report.equal(gradient_error(found, wanted), max(tolerance, 2 * cpu))} ({cpu:.1e})")
        else:
            cells += [report.equal(value, tolerance), report.equal(gradient_error(found, wanted), tolerance)]
    report.row(label, *cells, ", ".join(free))


def stage(report: Report) -> None:
    report.line(
        f"{report.device.type} against the CPU in float64: relative differences of a value and of its gradient."
    )
    report.line(
        "Tolerances: float64 1e-12, float32 1e-5, bfloat16 2e-2. A bfloat16 gradient may differ by twice what the"
    )
    report.line(
        "CPU's own differs by (in brackets), where that is more. Last column: pairs of token and layer that choose"
    )
    report.line(
        "other experts when they are free to, in float64, float32, bfloat16; none with a label may but in bfloat16."
    )
    kinds = [f"{str(dtype)[6:]}{what}" for dtype in TOLERANCE for what in ("", ", gradient")]
    report.table("what", *kinds, "moved")
    for label, settings in MODELS.items():
        with report.trial(f"cross-entropy, {label}"):
            check(report, f"cross-entropy, {label}", settings, None, {})
    for label, name, options in variants():
        with report.trial(label):
            check(report, label, MODEL, name, options)
    with report.trial("cp, sigmoid scores"):
        check(report, "cp, sigmoid scores", MODELS["sigmoid"], "cp", {"weight": 1.0})
