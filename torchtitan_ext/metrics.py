"""Measures of routing and specialization, without gradients.

The first ones are cheap enough for every training step. Those that need SciPy or scikit-learn (imported when called)
are for analysis. Shapes: T tokens, E experts, k chosen experts, D model width, F expert hidden width. Definitions:
docs/metrics.md.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops.gram import row_scales, squared_cosines, squares_limit, token_gram, token_rows
from torchtitan_ext.ops.response import coupling_matrix
from torchtitan_ext.ops.routing import normalize_scores, weighted_sum


@torch.no_grad()
def max_vio(counts: Tensor) -> Tensor:
    """`max_e c_e / mean(c) - 1` of the assignment counts (..., E): 0 when balanced, and for counts that are all 0."""
    counts = counts.to(torch.float64)
    mean = counts.mean(-1)
    return torch.where(mean > 0, counts.amax(-1) / torch.where(mean > 0, mean, 1.0) - 1.0, 0.0)


@torch.no_grad()
def dead_fraction(counts: Tensor) -> Tensor:
    """Fraction of experts without a token: counts (..., E) -> (...)."""
    return (counts == 0).to(torch.float64).mean(-1)


def token_entropy(scores: Tensor) -> Tensor:
    """`-sum_e s_e log s_e` in nats per token; scores (T, E) that sum to 1 -> (T,). A score of 0 adds 0 and has gradient 0."""
    if scores.requires_grad:  # the derivative at 0 is infinite, and softmax's backward would multiply it by 0
        scores = torch.where(scores == 0, 0.0, scores)
    return torch.special.entr(scores).sum(-1)


def margins(scores_TE: Tensor, top_k: int) -> Tensor:
    """Gap between each token's k-th and (k+1)-th score: (T, E) -> (T,); the k-th score itself when k = E."""
    if top_k >= scores_TE.shape[1]:
        return scores_TE.amin(1)
    best = scores_TE.topk(top_k + 1, dim=1).values
    return best[:, top_k - 1] - best[:, top_k]


@torch.no_grad()
def routing_entropy(scores: Tensor) -> Tensor:
    """Mean over tokens of the entropy, in nats, of the normalised routing scores (T, E)."""
    return token_entropy(_normalised(scores)).mean()


@torch.no_grad()
def conditional_routing(earlier_ids: Tensor, later_ids: Tensor, experts: int, mask: Tensor | None = None) -> Tensor:
    """cond[e, v]: P(v chosen in the later layer given e chosen in the earlier one).

    earlier_ids, later_ids: (T, k). mask: (T,), the tokens to count. Returns (E, E) float64, rows sum to k (0 if unused)."""
    if mask is not None:
        earlier_ids, later_ids = earlier_ids[mask], later_ids[mask]
    pairs = earlier_ids.unsqueeze(2) * experts + later_ids.unsqueeze(1)
    joint = torch.bincount(pairs.flatten(), minlength=experts * experts).reshape(experts, experts).to(torch.float64)
    used = torch.bincount(earlier_ids.flatten(), minlength=experts).to(torch.float64)
    return joint / used.clamp(min=1).unsqueeze(1)


@torch.no_grad()
def load_variation(counts: Tensor) -> Tensor:
    """Coefficient of variation of the assignment counts (..., E): standard deviation / mean; 0 when all are 0."""
    counts = counts.to(torch.float64)
    mean = counts.mean(-1)
    return torch.where(mean > 0, counts.std(-1, correction=0) / torch.where(mean > 0, mean, 1.0), 0.0)


@torch.no_grad()
def topk_mass(scores: Tensor, topk_ids: Tensor) -> Tensor:
    """Mean over tokens of the normalised score mass on the chosen experts: (T, E), (T, k) -> ()."""
    scores = _normalised(scores)
    return scores.gather(-1, topk_ids).sum(-1).mean()


@torch.no_grad()
def routing_margin(scores: Tensor, top_k: int) -> Tensor:
    """Mean gap between the k-th and the (k+1)-th normalised score, (T, E) -> (). ValueError when k is not below E."""
    if top_k >= scores.shape[-1]:
        raise ValueError(f"routing_margin: no expert is left out with top_k={top_k} of {scores.shape[-1]} experts")
    best = _normalised(scores).topk(top_k + 1, dim=-1).values
    return (best[..., top_k - 1] - best[..., top_k]).mean()


@torch.no_grad()
def expert_overlap(x: Tensor, rows: Tensor | None = None) -> Tensor:
    """Mean squared cosine of co-activated experts' vectors, in [0, 1]; chance level about 1 / width. 0 for k = 1.

    x: (T, k, F) activations z, or outputs y; or (R, F) in any order with rows: (T, k).
    """
    rows, x = token_rows(x, rows)
    k = rows.shape[1]
    return weighted_sum(squared_cosines(token_gram(x, rows, scaled=True)), None) / max(k * (k - 1), 1)


@torch.no_grad()
def mean_gate_imbalance(gates: Tensor) -> Tensor:
    """`(1/E) sum_e (mean_i g_ie - 1/E)^2` of gates (T, E) that sum to 1: 0 when balanced. Source: Guo et al., appendix
    E.

    Not the variance over tokens, which is minus `routing_variance_loss`."""
    gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
    return (gates.mean(0) - 1.0 / gates.shape[1]).square().mean()


@torch.no_grad()
def expert_response(router_weight: Tensor, gate_weight: Tensor) -> Tensor:
    """erc's M without noise, its rows divided by their diagonal: norm of expert j's response to routing vector i.

    router_weight: (E, D), gate_weight: (E, F, D). Returns (E, E). Values below 1 off the diagonal mean that each expert
    responds most to its own routing vector. The length of routing vectors, and of all gate weights together, does not
    matter. A row whose own response is 0 becomes 0."""
    dtype = accumulation_dtype(router_weight.dtype)
    router_weight, gate_weight = router_weight.to(dtype), gate_weight.to(dtype)
    most = squares_limit(dtype) ** 0.25
    router_weight = router_weight * row_scales(router_weight, most).unsqueeze(1)
    matrix = coupling_matrix(router_weight, gate_weight * row_scales(gate_weight.flatten(), most))
    own = matrix.diagonal().unsqueeze(1)
    return torch.where(own == 0, 0.0, matrix / own)


def _normalised(scores: Tensor) -> Tensor:
    return normalize_scores(scores.to(accumulation_dtype(scores.dtype)))


def _array(x: Tensor) -> "np.ndarray[Any, Any]":
    return x.detach().cpu().to(torch.float64 if x.is_floating_point() else torch.int64).numpy()


def match_experts(joint: Tensor) -> tuple["np.ndarray[Any, Any]", float]:
    """The one-to-one matching of rows to columns with the largest sum of `joint` (E, E), by SciPy's assignment solver.

    Returns (column of every row (E,), that sum as a fraction of all of `joint`, 0 when `joint` is all 0).
    """
    from scipy.optimize import linear_sum_assignment

    counts = _array(joint)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    total = counts.sum()
    return columns, float(counts[rows, columns].sum() / total) if total > 0 else 0.0


def coupling_kappa(earlier_ids: Tensor, later_ids: Tensor, experts: int) -> float:
    """kappa: `max over permutations pi of P(pi(C_l) = C_{l+1})`, C the top-1 experts (T,) of two neighbouring layers.

    1 when all tokens of an expert go to the same expert of the next layer, a different one for each. Chance level:
    about 1/E, more for few tokens or uneven loads. Source: Hu et al."""
    joint = torch.bincount(earlier_ids * experts + later_ids, minlength=experts * experts)
    return match_experts(joint.reshape(experts, experts))[1]


class Persistence(NamedTuple):
    top1: float
    """Fraction of tokens whose first choice is unchanged."""
    topk: float
    """Fraction of the k choices that are unchanged, mean over tokens."""


@torch.no_grad()
def routing_persistence(before: Tensor, after: Tensor) -> Persistence:
    """Fraction of unchanged routing choices of the same tokens. before, after: (T, k) ids, best first."""
    kept = (before.unsqueeze(2) == after.unsqueeze(1)).any(2).to(torch.float64).mean()
    return Persistence((before[:, 0] == after[:, 0]).to(torch.float64).mean().item(), kept.item())


def routing_silhouette(inputs: Tensor, top1_ids: Tensor, sample: int = 0, seed: int = 0) -> float:
    """Silhouette of router inputs (T, D) grouped by their top-1 expert (T,), Euclidean, in [-1, 1]; by scikit-learn.

    sample: the number of tokens to use, 0 for all; it computes T^2 distances. Raises ValueError when fewer than two
    experts, or as many as tokens, are used."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(_array(inputs), _array(top1_ids), sample_size=sample or None, random_state=seed))


def knn_overlap(inputs: Tensor, top1_ids: Tensor, neighbours: int = 10) -> float:
    """Mean fraction of a token's nearest neighbours that have another top-1 expert.

    inputs: (T, D) router inputs, Euclidean distance. Chance level: 1 - sum of squared load fractions. Raises ValueError
    for fewer than neighbours + 1 tokens. Source: Guo et al., appendix E; the number of neighbours is our choice."""
    from sklearn.neighbors import NearestNeighbors

    ids = _array(top1_ids)
    nearest = NearestNeighbors(n_neighbors=neighbours).fit(_array(inputs)).kneighbors(return_distance=False)
    return float((ids[nearest] != ids[:, None]).mean())


def balanced_clusters(inputs: Tensor, clusters: int, seed: int = 0) -> "np.ndarray[Any, Any]":
    """k-means clusters of equal size: (T, D) -> (T,) labels.

    scikit-learn finds the centres. Then (token, centre) pairs are visited in order of distance; a token without a
    cluster joins it while the cluster has fewer than ceil(T / clusters) tokens."""
    from sklearn.cluster import KMeans

    points = _array(inputs)
    distances = KMeans(clusters, n_init=4, random_state=seed).fit(points).transform(points)
    free = np.full(clusters, -(-len(points) // clusters))
    labels = np.full(len(points), -1)
    for pair in np.argsort(distances, axis=None, kind="stable"):
        token, cluster = divmod(int(pair), clusters)
        if labels[token] < 0 and free[cluster]:
            labels[token] = cluster
            free[cluster] -= 1
    return labels


def cluster_agreement(inputs: Sequence[Tensor], clusters: int, seed: int = 0) -> list[float]:
    """Fraction of tokens that are in matching clusters of router inputs in one layer and the next.

    inputs: L tensors (T, D) of the same tokens. `balanced_clusters` of consecutive layers are matched one-to-one.
    Returns L - 1 fractions. Chance level for many tokens: 1 / clusters. Source: Hu et al., Fig. 7."""
    labels = [torch.from_numpy(balanced_clusters(x, clusters, seed)) for x in inputs]
    return [coupling_kappa(a, b, clusters) for a, b in itertools.pairwise(labels)]


@torch.no_grad()
def domain_load(topk_ids: Tensor, domains: Tensor, experts: int, count: int) -> Tensor:
    """Assignments per data domain and expert: ids (T, k), the domain of each token (T,) -> (count, E) int64."""
    pairs = domains.unsqueeze(1) * experts + topk_ids
    return torch.bincount(pairs.flatten(), minlength=count * experts).reshape(count, experts)


def domain_information(load: Tensor) -> float:
    """I(expert; domain) in nats from assignments per domain and expert (domains, E), by scikit-learn; 0 when all are 0."""
    from sklearn.metrics import mutual_info_score

    counts = _array(load)
    return max(0.0, float(mutual_info_score(None, None, contingency=counts))) if counts.sum() else 0.0
