"""The losses of a Megatron-Core model token by token, by their definitions, from tensors that hooks take from Megatron's own
model. Uses none of the adapter's code and none of the library's losses.

To be used in processes that `tests.helpers.ranks.launch` has started.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tests.helpers.megatron_models import SEQUENCES, TOP_K, batch, counted, gradients


class Layer(NamedTuple):
    """What one MoE layer did with N tokens, in Megatron's order (S, B)."""

    scores: Tensor
    """(N, E), they sum to 1."""
    gates: Tensor
    """(N, E), 0 where not chosen."""
    chosen: list[list[int]]
    z: list[list[Tensor]]
    """Of each token, the activations (F,) of its chosen experts."""


class Judged(NamedTuple):
    loss: float
    values: dict[str, float]
    gradients: dict[str, Tensor]


def judged(
    model: Any, weights: dict[str, float], options: dict[str, Any], steps: list[list[int]], padded: bool
) -> Judged:
    """Value and gradients of the cross-entropy plus the weighted terms, over all SEQUENCES sequences in one pass.

    weights: by term. options: as the adapter's fields, without "moe_". steps: the sequences of each micro-step."""
    taken, handles = _watch(model)
    everything = list(range(SEQUENCES))
    ids, positions, mask = batch(everything)
    keep_BS = counted(everything, padded)
    model.zero_grad()
    per_token_BS = model(ids, positions, mask, labels=ids)
    for handle in handles:
        handle.remove()
    layers = [_layer(one, model.config.moe_router_score_function) for one in taken]  # MoE layers only
    w_BS = keep_BS / keep_BS.sum()
    token_weights = w_BS.t().reshape(-1)
    total = (per_token_BS * w_BS).sum()
    loss, values = total.item(), {}
    for name, weight in weights.items():
        value = TERMS[name](layers, token_weights, options, steps)
        values[name] = value.item()
        total = total + weight * value
    total.backward()
    return Judged(loss, values, gradients(model))


def _watch(model: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Hooks that keep, of each MoE layer: logits, gate weights, the choice, and gate and up projections of experts."""
    taken, handles = [], []
    for layer in model.decoder.layers:
        if not hasattr(layer.mlp, "router"):
            continue
        seen: dict[str, Any] = {"fc1": []}
        taken.append(seen)
        experts, router = layer.mlp.experts, layer.mlp.router
        firsts = (
            [e.linear_fc1 for e in experts.local_experts] if hasattr(experts, "local_experts") else [experts.linear_fc1]
        )
        for first in firsts:
            handles.append(first.register_forward_hook(lambda _m, _i, out, seen=seen: seen["fc1"].append(out[0])))
        handles.append(
            router.register_forward_hook(lambda _m, _i, out, seen=seen: seen.update(gates=out[0], map=out[1]))
        )
        gating = router.gating

        def watched(x: Tensor, gating: Any = gating, seen: dict[str, Any] = seen) -> Tensor:
            seen["logits"] = gating(x)
            return seen["logits"]

        router.gating = watched
    return taken, handles


def _layer(seen: dict[str, Any], score: str) -> Layer:
    gate, up = torch.cat(seen["fc1"]).chunk(2, -1)
    rows = functional.silu(gate) * up  # sorted by expert, then by token
    logits = seen["logits"].flatten(0, 1)
    scores = logits.sigmoid() if score == "sigmoid" else logits.exp()
    scores = scores / scores.sum(-1, keepdim=True)
    chosen = [one.nonzero().flatten().tolist() for one in seen["map"]]
    row_of, row = {}, 0
    for expert in range(logits.shape[1]):
        for token, own in enumerate(chosen):
            if expert in own:
                row_of[token, expert] = row
                row += 1
    z = [[rows[row_of[token, expert]] for expert in own] for token, own in enumerate(chosen)]
    return Layer(scores, seen["gates"], chosen, z)


def _sp(layers: list[Layer], w: Tensor, options: dict[str, Any], _: list[list[int]]) -> Tensor:
    total = w.new_zeros(())
    for layer in layers:
        for token, own in enumerate(layer.z):
            z_KF = torch.stack(own)
            z_KF = z_KF / z_KF.norm(dim=1, keepdim=True)
            squares = (z_KF @ z_KF.t())[~torch.eye(TOP_K, dtype=torch.bool)] ** 2
            if options.get("sp_above_chance"):
                squares = (squares - 1 / z_KF.shape[1]).clamp(min=0)
            total = total + w[token] * squares.sum()
    return total


def _cp(layers: list[Layer], w: Tensor, options: dict[str, Any], steps: list[list[int]]) -> Tensor:
    total = w.new_zeros(())
    source = options.get("cp_source", "all")
    for earlier, later in itertools.pairwise(layers):
        if source == "transition":
            for step in steps:
                members = [t for t in range(len(w)) if t % SEQUENCES in step]
                c = sum(w[t] * torch.outer(earlier.scores[t], later.scores[t]) for t in members)
                total = total - c.topk(TOP_K, dim=1).values.sum()  # type: ignore[union-attr]
            continue
        for token, own in enumerate(earlier.chosen):
            experts = range(earlier.scores.shape[1]) if source == "all" else own
            joint_EE = torch.outer(earlier.scores[token, list(experts)], later.scores[token])
            mass = joint_EE.topk(TOP_K, dim=1).values.sum()
            total = total - w[token] * (mass.log() if options.get("cp_form") == "log" else mass)
    return total


def _sets(w: Tensor, scope: str, steps: list[list[int]]) -> list[list[int]]:
    """The tokens over which lb and v form their means: those of a sequence, or of a micro-step."""
    groups = [[s] for s in range(SEQUENCES)] if scope == "sequence" else steps
    return [[t for t in range(len(w)) if t % SEQUENCES in group and w[t] > 0] for group in groups]


def _lb(layers: list[Layer], w: Tensor, options: dict[str, Any], steps: list[list[int]]) -> Tensor:
    total = w.new_zeros(())
    for layer in layers:
        experts = layer.scores.shape[1]
        for members in _sets(w, options.get("lb_scope", "global"), steps):
            p = sum(w[t] * layer.scores[t] for t in members)
            for expert in range(experts):
                f = sum(expert in layer.chosen[t] for t in members) / (TOP_K * len(members))
                total = total + experts * f * p[expert]  # type: ignore[index]
    return total


def _v(layers: list[Layer], w: Tensor, options: dict[str, Any], steps: list[list[int]]) -> Tensor:
    total = w.new_zeros(())
    for layer in layers:
        gates = layer.gates / layer.gates.sum(-1, keepdim=True)
        if options.get("v_variant") == "code":
            total = total - sum(w[t] * gates[t].var(correction=1) for t in range(len(w)))
            continue
        for members in _sets(w, options.get("v_scope", "sequence"), steps):
            mean = sum(gates[t] for t in members) / len(members)
            for token in members:
                total = total - w[token] * ((gates[token] - mean) ** 2).mean()
    return total


TERMS = {"sp": _sp, "cp": _cp, "lb": _lb, "v": _v}
