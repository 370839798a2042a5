"""Small Transformers MoE models with a tokenizer, rows to fine-tune them on, and the terms computed from their definition."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.make_tiny_model import make_model, make_tokenizer
from torchtitan_ext.losses import coupling_loss, load_balance_loss, router_z_loss, specialization_loss

QUESTIONS = ("two and two", "three and one", "ten less four", "six by two")
ANSWERS = ("four", "four", "six", "twelve")
CHATS = [
    {"messages": [{"role": "user", "content": f"what is {q}?"}, {"role": "assistant", "content": f"it is {a}."}]}
    for q, a in zip(QUESTIONS, ANSWERS, strict=True)
]
PAIRS = [{"prompt": f"what is {q}? ", "completion": f"it is {a}."} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]


@functools.cache
def tokenizer() -> Any:
    return make_tokenizer()


def model(kind: str = "qwen3_moe", seed: int = 0) -> Any:
    """A model with weights large enough for the terms to differ from their values at random."""
    found = make_model(kind, seed)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(5.0)
    return found


@torch.no_grad()
def expected_terms(network: Any, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """lb, z, sp and cp of qwen3_moe on the micro-batches of a step, summed over layers; means over all labelled tokens.

    Computed from the inputs of routers and experts that forward hooks record, expert by expert. lb's f and P are formed
    over the tokens of each micro-batch."""
    total = sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in batches)
    result = dict.fromkeys(("lb", "z", "sp", "cp"), 0.0)
    for batch in batches:
        labels = F.pad(batch["labels"], (0, 1), value=-100)[..., 1:].reshape(-1)
        weights = (labels != -100).float() / total
        routed, activations = recorded(network, batch)
        scores = [logits.float().softmax(-1) for logits, _ in routed]
        ids = [chosen for _, chosen in routed]
        share = float(weights.sum())
        for (logits, chosen), s, z in zip(routed, scores, activations, strict=True):
            kept = weights > 0
            result["lb"] += share * float(load_balance_loss(s[kept], chosen[kept]))
            result["z"] += float(router_z_loss(logits.float(), weights=weights))
            result["sp"] += float(specialization_loss(z, weights=weights))
        result["cp"] += float(coupling_loss(scores, ids[0].shape[1], weights=weights))
    return result


def recorded(network: Any, batch: dict[str, Tensor]) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Per layer (router logits, chosen experts), and the activations z (T, k, F) of the chosen experts."""
    routed: list[tuple[Tensor, Tensor]] = []
    activations: list[Tensor] = []

    def see_router(_: Any, __: Any, output: Any) -> None:
        routed.append((output[0], output[2]))

    def see_experts(module: Any, inputs: Any, _: Any) -> None:
        hidden, chosen = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
        gate, up = module.gate_up_proj.chunk(2, dim=1)
        rows = [
            torch.stack([F.silu(gate[e] @ x) * (up[e] @ x) for e in ids.tolist()])
            for x, ids in zip(hidden, chosen, strict=True)
        ]
        activations.append(torch.stack(rows))

    hooks = []
    for layer in network.model.layers:
        hooks += [
            layer.mlp.gate.register_forward_hook(see_router),
            layer.mlp.experts.register_forward_hook(see_experts),
        ]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "use_cache")}
    network(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return routed, activations
