"""The terms of a model of Transformers, token by token in float64, from what its routers and experts got: no code of ours.

Only the uniform numbers behind erc's noise come from the library: which numbers are drawn is a convention.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtitan_ext.ops import draws

NAMES = (
    *("lb", "lb-sequence", "z", "sp", "cp", "cp-activated", "cp-transition"),
    *("o", "o-code", "v", "v-global", "v-code", "erc"),
)


class Layer(NamedTuple):
    """What one MoE layer of the plain model computed, with its graph."""

    logits: Tensor
    scores: Tensor
    ids: Tensor
    gates: Tensor
    hidden: Tensor
    experts: Any
    router_weight: Tensor


@contextmanager
def captured(model: Any, score: str) -> Iterator[list[Layer]]:
    """The layers of the next forward pass of a plain model."""
    layers: list[Layer] = []
    routed: list[tuple[Tensor, Tensor]] = []

    def router(module: Any, arguments: Any, output: Any) -> None:  # noqa: ARG001
        (weight,) = [p for p in module.parameters() if p.dim() == 2 and p.shape[0] > 1]
        routed.append((output[0].reshape(-1, output[0].shape[-1]), weight))

    def experts(module: Any, arguments: Any, options: Any) -> None:
        hidden, ids, gates = (*arguments, *options.values())
        logits, weight = routed.pop()
        logits = logits.double()
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        layers.append(Layer(logits, scores, ids, gates.double(), hidden, module, weight))

    hooks = []
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate"):
            hooks.append(module.register_forward_pre_hook(experts, with_kwargs=True))
            block = model.get_submodule(name.rpartition(".")[0])
            gate = (
                getattr(block, "gate", None)
                if isinstance(getattr(block, "gate", None), torch.nn.Module)
                else block.router
            )
            hooks.append(gate.register_forward_hook(router))
    yield layers
    for hook in hooks:
        hook.remove()


def activation(layer: Layer, token: int, expert: int) -> tuple[Tensor, Tensor]:
    """z and y of one token at one expert."""
    e = layer.experts
    x = layer.hidden[token]

    def product(weight: Tensor, x: Tensor) -> Tensor:
        return x @ weight if e.is_transposed else weight @ x

    gate_up = product(e.gate_up_proj[expert], x)
    gate_up = gate_up + e.gate_up_proj_bias[expert] if e.has_bias else gate_up
    z = e._apply_gate(gate_up.unsqueeze(0)).squeeze(0)
    y = product(e.down_proj[expert], z)
    y = y + e.down_proj_bias[expert] if e.has_bias else y
    return z.double(), y.double()


def terms(
    layers: list[Layer], weights: Tensor, sequences: list[list[int]], seed: int = 0, step: int = 1
) -> dict[str, Tensor]:
    """Every variant of every term. weights: (T,), 1 / (labelled tokens of the step) or 0. sequences: their tokens."""
    rows = weights.tolist()
    labelled = [i for i, w in enumerate(rows) if w > 0]
    zero = torch.zeros((), dtype=torch.float64)
    found = {name: zero.clone() for name in NAMES}
    for number, layer in enumerate(layers):
        experts = layer.scores.shape[1]
        for i in labelled:
            found["z"] = found["z"] + rows[i] * layer.logits[i].exp().sum().log() ** 2
            pairs = [activation(layer, i, e) for e in layer.ids[i].tolist()]
            zs, ys = [z for z, _ in pairs], [y for _, y in pairs]
            for a, b in itertools.permutations(range(len(pairs)), 2):
                cosine = zs[a] @ zs[b] / (zs[a].norm() * zs[b].norm())
                found["sp"] = found["sp"] + rows[i] * cosine**2
                projection = ys[a] @ ys[b] / (ys[b] @ ys[b] + 1e-6) * ys[b]
                found["o"] = found["o"] + rows[i] * (projection @ projection)
            for a in range(len(pairs)):
                basis = torch.linalg.qr(torch.stack([y for b, y in enumerate(ys) if b != a]).t())[0]
                found["o-code"] = found["o-code"] + rows[i] * (basis.t() @ ys[a]).square().sum() / len(pairs)
            gates = full_gates(layer, i)
            found["v-code"] = found["v-code"] - rows[i] * gates.var(unbiased=True)
        for name, groups in (("", [labelled]), ("-sequence", [[i for i in s if i in labelled] for s in sequences])):
            for group in filter(None, groups):
                share = sum(rows[i] for i in group)
                f = torch.zeros(experts, dtype=torch.float64)
                for i in group:
                    for e in layer.ids[i].tolist():
                        f[e] += 1.0 / (len(group) * layer.ids.shape[1])
                mean_score = torch.stack([layer.scores[i] for i in group]).mean(0)
                found[f"lb{name}"] = found[f"lb{name}"] + share * experts * (f * mean_score).sum()
                gates = torch.stack([full_gates(layer, i) for i in group])
                variance = ((gates - gates.mean(0)) ** 2).sum() / (len(group) * experts)
                key = "v" if name else "v-global"
                found[key] = found[key] - share * variance
        found["erc"] = found["erc"] + coupling(layer, number, seed, step) * weights.sum()
        if number:
            add_cross_layer(found, layers[number - 1], layer, rows, labelled)
    return found


def full_gates(layer: Layer, token: int) -> Tensor:
    """A token's gate weights over all experts, with sum 1."""
    gates = torch.zeros(layer.scores.shape[1], dtype=torch.float64)
    return gates.index_put((layer.ids[token],), layer.gates[token] / layer.gates[token].sum())


def add_cross_layer(
    found: dict[str, Tensor], before: Layer, layer: Layer, rows: list[float], labelled: list[int]
) -> None:
    k, experts = layer.ids.shape[1], layer.scores.shape[1]
    transitions = torch.zeros(experts, experts, dtype=torch.float64)
    for i in labelled:
        s, t = before.scores[i], layer.scores[i]
        for e in range(experts):
            joint = s[e] * t
            part = joint[joint.topk(k).indices].sum()
            found["cp"] = found["cp"] - rows[i] * part
            if e in layer_choice(before, i):
                found["cp-activated"] = found["cp-activated"] - rows[i] * part
        transitions = transitions + rows[i] * torch.outer(s, t)
    found["cp-transition"] = found["cp-transition"] - transitions.topk(k, dim=1).values.sum()


def layer_choice(layer: Layer, token: int) -> list[int]:
    return [int(e) for e in layer.ids[token]]


def coupling(layer: Layer, number: int, seed: int, step: int) -> Tensor:
    """erc of one layer."""
    weight = layer.router_weight
    experts, dim = weight.shape
    key = (draws.ERC_NOISE, seed, number, torch.tensor(step))
    uniform = draws.keyed_uniform(
        *key,
        rows_B=torch.arange(experts),
        columns_S=torch.arange(dim),
        device=weight.device,
        dtype=torch.float32,
    ).double()
    routers = weight.double()
    e = layer.experts
    m: dict[tuple[int, int], Tensor] = {}
    for i in range(experts):
        others = [float((routers[i] - routers[j]).detach().norm()) for j in range(experts) if j != i]
        eps = min(others) / (2 * float(routers[i].detach().norm()))
        probe = routers[i] * (1 - eps + 2 * eps * uniform[i])
        for j in range(experts):
            gate_up = e.gate_up_proj[j].t() if e.is_transposed else e.gate_up_proj[j]
            gate = gate_up[: len(gate_up) // 2] if e.is_concatenated else gate_up[::2]
            m[i, j] = (gate.double() @ probe).norm()
    total = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.permutations(range(experts), 2):
        total = total + (m[i, j] - m[i, i]).clamp(min=0) + (m[j, i] - m[i, i]).clamp(min=0)
    return total / experts**2
