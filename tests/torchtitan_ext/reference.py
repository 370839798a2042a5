"""The definitions, as plain loops over tokens and experts in float64: slow, independent of the library, differentiable."""

import torch
from torch import Tensor


def zero(x: Tensor) -> Tensor:
    return x.sum() * 0.0


def load_balance(scores: Tensor, ids: Tensor) -> Tensor:
    tokens, experts = scores.shape
    k = ids.shape[1]
    total = zero(scores)
    for e in range(experts):
        f = sum(1 for i in range(tokens) for a in range(k) if int(ids[i, a]) == e) / (k * tokens)
        p = zero(scores)
        for i in range(tokens):
            p = p + scores[i, e] / sum(scores[i, v] for v in range(experts))
        total = total + experts * f * p / tokens
    return total


def z_loss(logits: Tensor) -> Tensor:
    total = zero(logits)
    for row in logits:
        total = total + torch.log(sum(torch.exp(q) for q in row)) ** 2
    return total / len(logits)


def specialization(z: Tensor) -> Tensor:
    tokens, k, _ = z.shape
    total = zero(z)
    for i in range(tokens):
        for e in range(k):
            for v in range(k):
                if e != v and bool(z[i, e].any()) and bool(z[i, v].any()):
                    dot = (z[i, e] * z[i, v]).sum()
                    total = total + dot**2 / ((z[i, e] ** 2).sum() * (z[i, v] ** 2).sum())
    return total / tokens


def coupling(scores: list[Tensor], k: int, source: str = "all", ids: list[Tensor] | None = None) -> Tensor:
    """Eq. 7: for each expert e of a layer, the k experts of the next with the largest joint product."""
    total = zero(scores[0])
    tokens, experts = scores[0].shape
    for layer in range(len(scores) - 1):
        for i in range(tokens):
            sources = range(experts) if source == "all" else [int(e) for e in ids[layer][i]]
            for e in sources:
                joint = [scores[layer][i, e] * scores[layer + 1][i, v] for v in range(experts)]
                best = sorted(range(experts), key=lambda v: -joint[v].item())[:k]
                total = total - sum(joint[v] for v in best)
    return total / tokens
