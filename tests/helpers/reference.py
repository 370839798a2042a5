"""The definitions, as plain loops over tokens and experts in float64: slow, independent of the library,
differentiable."""

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


def specialization(z: Tensor, floor: float = 0.0) -> Tensor:
    tokens, k, _ = z.shape
    total = zero(z)
    for i in range(tokens):
        for e in range(k):
            for v in range(k):
                if e != v and bool(z[i, e].any()) and bool(z[i, v].any()):
                    dot = (z[i, e] * z[i, v]).sum()
                    square = dot**2 / ((z[i, e] ** 2).sum() * (z[i, v] ** 2).sum())
                    if square > floor:
                        total = total + square - floor
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


def orthogonality(y: Tensor, eps: float = 1e-6) -> Tensor:
    tokens, k, _ = y.shape
    total = zero(y)
    for i in range(tokens):
        for a in range(k):
            for b in range(k):
                if a != b:
                    onto = y[i, b]
                    projection = (y[i, a] * onto).sum() / ((onto * onto).sum() + eps) * onto
                    total = total + (projection * projection).sum()
    return total / tokens


def orthogonality_code(y: Tensor) -> Tensor:
    """Projection on the span of the others, by Gram-Schmidt."""
    tokens, k, _ = y.shape
    total = zero(y)
    for i in range(tokens):
        for a in range(k):
            basis: list[Tensor] = []
            for b in range(k):
                if b != a:
                    rest = y[i, b]
                    for unit in basis:
                        rest = rest - (rest * unit).sum() * unit
                    length = (rest * rest).sum()
                    if length.item() > 1e-20:
                        basis.append(rest / length.sqrt())
            for unit in basis:
                total = total + (y[i, a] * unit).sum() ** 2
    return total / (tokens * k)


def routing_variance(gates: Tensor) -> Tensor:
    tokens, experts = gates.shape
    total = zero(gates)
    for e in range(experts):
        mean = sum(gates[i, e] for i in range(tokens)) / tokens
        for i in range(tokens):
            total = total - (gates[i, e] - mean) ** 2 / (experts * tokens)
    return total


def routing_variance_code(gates: Tensor) -> Tensor:
    tokens, experts = gates.shape
    total = zero(gates)
    for i in range(tokens):
        mean = sum(gates[i, e] for e in range(experts)) / experts
        total = total - sum((gates[i, e] - mean) ** 2 for e in range(experts)) / (experts - 1) / tokens
    return total


def expert_router_coupling(router: Tensor, gate: Tensor, alpha: float, delta: Tensor) -> Tensor:
    experts = router.shape[0]
    m = [[(gate[j] @ (router[i] * delta[i])).pow(2).sum().sqrt() for j in range(experts)] for i in range(experts)]
    total = zero(router)
    for i in range(experts):
        for j in range(experts):
            if i != j:
                total = total + (m[i][j] - alpha * m[i][i]).clamp(min=0) + (m[j][i] - alpha * m[i][i]).clamp(min=0)
    return total / experts**2


def noise_bound(router: Tensor) -> list[float]:
    experts = router.shape[0]
    return [
        min((router[i] - router[j]).norm().item() for j in range(experts) if j != i) / (2 * router[i].norm().item())
        for i in range(experts)
    ]
