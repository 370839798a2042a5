"""The regularization losses of Mixture-of-Experts routing, as plain functions.

Shapes: T tokens, E experts, k chosen experts, F expert hidden width, L layers. Every function is a mean over tokens for
one layer (the caller sums over layers; only `coupling_loss` sees several) and returns a scalar in at least float32
(float64 for float64 input). With no token the result is a connected 0.

`weights` (T,) replaces the mean's 1/T: with 1/N for each of the N labelled tokens of the *global* batch and 0 for the
others, the results of micro-batches and ranks add up to the value of the whole.

Sources: Fedus et al. 2101.03961 (lb), Zoph et al. 2202.08906 (z), Hu et al., "Synergistic Intra- and Cross-Layer
Regularization Losses for MoE Expert Specialization" (sp: Eq. 4, cp: Eq. 7), Guo et al., "Advancing Expert Specialization for
Better MoE" (o, v), Lv et al., "Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss" (erc).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_ext.collectives import Group, all_sum
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops import native
from torchtitan_ext.ops.gram import squared_cosines, squared_projections, squared_span_projections, token_gram
from torchtitan_ext.ops.response import lengths


def mean_weights(values: Tensor, shape: Sequence[int] | torch.Size) -> Tensor:
    """The weights of a plain mean over `shape` tokens: 1/T each."""
    count = 1
    for size in shape:
        count *= size
    return torch.full(tuple(shape), 1.0 / max(count, 1), dtype=values.dtype, device=values.device)


def weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """`sum_i w_i values_i`; w is 1/T when not given."""
    if weights is None:
        weights = mean_weights(values, values.shape)
    return (values * weights.to(values.dtype)).sum()


def _accumulate(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def normalize_scores(scores: Tensor) -> Tensor:
    """Scores divided by their sum over experts: (..., E) -> (..., E). Softmax scores come back as they are."""
    return scores / scores.sum(-1, keepdim=True)


def expert_load(topk_ids: Tensor, experts: int, weights: Tensor) -> Tensor:
    """The assignments of each expert, each counted with its token's weight; no gradient.

    topk_ids: (..., T, k) int64, weights: (..., T). Returns (..., E).
    """
    load = weights.new_zeros(*topk_ids.shape[:-2], experts)
    per_assignment = weights.detach().unsqueeze(-1).expand(topk_ids.shape).flatten(-2)
    return load.scatter_add(-1, topk_ids.flatten(-2), per_assignment)


def load_shares(load: Tensor) -> Tensor:
    """f, each expert's share of the assignments: (..., E) -> (..., E), all 0 where there is none."""
    total = load.sum(-1, keepdim=True)
    return torch.where(total > 0, load / torch.where(total > 0, total, 1.0), 0.0)


def load_balance_loss(
    scores: Tensor, topk_ids: Tensor, load: Tensor | None = None, *, weights: Tensor | None = None
) -> Tensor:
    """lb: `E * sum_e f_e P_e`, f the share of assignments (no gradient), P the mean normalised score.

    scores: (T, E), normalised to sum to 1 here when they are sigmoids. topk_ids: (T, k), the real choice, bias included.
    load: (E,) shares f taken elsewhere (over all ranks, say). weights: (T,). A leading dimension, (B, S, E) and (B, S, k),
    forms f and P per sequence and averages over sequences. 1 when balanced. Source: Switch Transformer, Eqs. 4-6.
    """
    scores = normalize_scores(_accumulate(scores))
    if weights is None:
        weights = mean_weights(scores, scores.shape[:-1])
    weights = weights.to(scores.dtype)
    if load is None:
        load = load_shares(expert_load(topk_ids, scores.shape[-1], weights))
    mean_scores = (weights.unsqueeze(-2) @ scores).squeeze(-2)
    return scores.shape[-1] * (load.to(scores.dtype).detach() * mean_scores).sum()


def router_z_loss(logits: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """z: mean squared log-sum-exp of the router logits (T, E). Source: ST-MoE, Eq. 5."""
    return weighted_sum(_accumulate(logits).logsumexp(-1).square(), weights)


def specialization_loss(
    z: Tensor, *, rows: Tensor | None = None, weights: Tensor | None = None, above_chance: bool = False
) -> Tensor:
    """sp: mean over tokens of the sum over ordered pairs of chosen experts of `cos(z_e, z_v)^2`, in [0, k(k-1)].

    z: (T, k, F) SwiGLU activations of each token's chosen experts; or (R, F) in any order together with rows: (T, k)
    int64, where each token's are. A zero vector has cosine 0 with everything. above_chance: of every squared cosine only what
    exceeds 1/F, the mean of independent directions, so that nothing pulls experts apart that overlap by chance alone (ours).
    Source: Hu et al., Eq. 4.
    """
    rows, z = token_rows(z, rows)
    return weighted_sum(
        squared_cosines(token_gram(z, rows), chance_overlap(z.shape[-1]) if above_chance else 0.0), weights
    )


def chance_overlap(width: int) -> float:
    """The mean squared cosine of independent random directions in `width` dimensions."""
    return 1.0 / width


def token_rows(x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T, k, F) activations as the rows (T, k) and matrix (R, F) that the Gram engine takes."""
    if rows is not None:
        return rows, x
    tokens, k, width = x.shape
    return torch.arange(tokens * k, device=x.device).reshape(tokens, k), x.reshape(tokens * k, width)


def sketched_specialization_loss(
    z: Tensor, rows: Tensor, sketch: Tensor, signs: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """sp from two independent sketches of the activations and their exact norms.

    z: (R, F), rows: (T, k). sketch: (m, F) of +-1, m even; its halves are the two sketches. signs: (T, F) of +-1, shared by a
    token's k rows. Row z becomes `S (r * z) / sqrt(m / 2)`; each half estimates an inner product without bias, and so does the
    product of both the square. Unlike the exact value a token's estimate may be negative. Raises ValueError for an odd m.
    """
    tokens, k = rows.shape
    gathered = z[rows].flatten(0, 1)
    sketched, norms = sketch_rows(gathered, signs.repeat_interleave(k, 0), sketch)
    return weighted_sum(sketched_cosines(sketched.unflatten(0, (tokens, k)), norms.unflatten(0, (tokens, k))), weights)


def sketch_rows(z: Tensor, signs: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """What sp by sketches needs of each row: `S (r * z)` (R, m) in the type of z, and its squared length (R,).

    z: (R, F), signs: (R, F), sketch: (m, F). Both are sums over hidden units: of parts of them they add up.
    """
    exact = _accumulate(z)
    return ((exact * signs) @ sketch.t()).to(z.dtype), exact.square().sum(-1)


def sketched_cosines(sketched: Tensor, norms: Tensor) -> Tensor:
    """Estimates of each token's sum of squared cosines: sketches (T, k, m), squared lengths (T, k) -> (T,)."""
    if sketched.shape[2] % 2:
        raise ValueError(f"sketched_specialization_loss: {sketched.shape[2]} sketch dimensions can't be halved")
    half = sketched.shape[2] // 2
    parts = _accumulate(sketched).unflatten(2, (2, half)).transpose(1, 2)
    products = (parts @ parts.transpose(2, 3)) / half
    positive = norms > 0
    inverse = positive / torch.where(positive, norms, 1.0)
    squares = products[:, 0] * products[:, 1] * inverse.unsqueeze(2) * inverse.unsqueeze(1)
    off_diagonal = ~torch.eye(norms.shape[1], dtype=torch.bool, device=norms.device)
    return (squares * off_diagonal).sum((1, 2))


def coupling_source_mass(scores: Tensor, topk_ids: Tensor | None, source: str) -> Tensor:
    """cp's factor of the earlier layer: the score mass of the experts that the sum runs over, (T, E) -> (T,)."""
    if source == "all":
        return _accumulate(scores).sum(-1)
    if source == "activated":
        if topk_ids is None:
            raise ValueError("coupling_loss: source='activated' needs topk_ids, the experts chosen in each layer")
        return _accumulate(scores).gather(-1, topk_ids).sum(-1)
    raise ValueError(f"coupling_loss: source={source!r} is not one of 'all', 'activated', 'transition'")


def transition_coupling(
    earlier: Tensor, later: Tensor, top_k: int, weights: Tensor | None = None, group: Group | None = None
) -> Tensor:
    """cp by transitions for one pair of layers: minus the sum of the k largest entries of every row of
    `C = S_l^T S_{l+1} / T`; the choice carries no gradient. Scores (T, E) each; weights (T,) replace 1/T. group: the ranks that
    hold the other tokens; the choice is made over all of them, and their results add up."""
    earlier, later = _accumulate(earlier), _accumulate(later)
    if weights is None:
        weights = mean_weights(earlier, earlier.shape[:1])
    transitions = (earlier * weights.to(earlier.dtype).unsqueeze(1)).t() @ later
    chosen = all_sum(transitions.detach(), group).topk(top_k, dim=1).indices
    return -transitions.gather(1, chosen).sum()


def coupling_target_mass(scores: Tensor, top_k: int) -> Tensor:
    """cp's factor of the later layer: the mass of the k largest clean scores, (T, E) -> (T,)."""
    scores = _accumulate(scores)
    return scores.gather(-1, largest_ids(scores.detach(), top_k)).sum(-1)


def largest_ids(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of each row: (T, E) -> (T, count) int64. On a CPU four times as fast as `topk`."""
    if scores.dim() != 2 or not native.direct(scores, half=False):
        return scores.topk(count, dim=-1).indices
    if not 0 < count <= scores.shape[1]:
        raise ValueError(f"{count} of {scores.shape[1]} scores can't be chosen")
    ids = torch.empty(scores.shape[0], count, dtype=torch.int64)
    native.largest(scores.contiguous(), ids)
    return ids


def coupling_loss(
    scores: Sequence[Tensor],
    top_k: int,
    source: str = "all",
    topk_ids: Sequence[Tensor] | None = None,
    *,
    weights: Tensor | None = None,
    form: str = "mass",
) -> Tensor:
    """cp: `- sum over layer pairs of mean_i sum_e sum_{v in T_i(l,e)} s^l_ie s^{l+1}_iv`, in closed form.

    scores: L tensors (T, E), normalised by the caller when they are sigmoids. top_k: experts per token. source: "all", e
    runs over all experts; "activated", over topk_ids, L tensors (T, k). `T_i(l,e)` is the same top-k of the later layer
    for every e, so the triple sum is a product of two masses per token; its infimum is -(L-1). O(T*E). "transition": the k
    experts are the same for all tokens, the largest of row e of `S_l^T S_{l+1} / T`; the one reading that knows paths.
    form: "mass", as printed; "log" (ours, not with "transition"), the sum over pairs of the mean of minus the logarithm of each
    token's product of masses, whose gradient does not fade as 1/E where routing is still uniform.
    Raises ValueError for an unknown source or form. Source: Hu et al., Eq. 7.
    """
    if form == "log" and source == "transition":
        raise ValueError("coupling_loss: form='log' takes each token's mass, which source='transition' has not")
    total = _accumulate(scores[0]).sum() * 0.0
    for layer in range(len(scores) - 1):
        if source == "transition":
            total = total + transition_coupling(scores[layer], scores[layer + 1], top_k, weights)
            continue
        mass = coupling_source_mass(scores[layer], None if topk_ids is None else topk_ids[layer], source)
        total = total + weighted_sum(
            joint_coupling(mass, coupling_target_mass(scores[layer + 1], top_k), form), weights
        )
    return total


def joint_coupling(source_mass: Tensor, target_mass: Tensor, form: str = "mass") -> Tensor:
    """cp of each token from its two masses: (T,), (T,) -> (T,). Raises ValueError for an unknown form."""
    if form == "mass":
        return -source_mass * target_mass
    if form == "log":
        tiny = torch.finfo(source_mass.dtype).tiny
        return -(source_mass * target_mass).clamp(min=tiny).log()
    raise ValueError(f"coupling_loss: form={form!r} is not one of 'mass', 'log'")


def orthogonality_loss(
    y: Tensor,
    variant: str = "paper",
    eps: float = 1e-6,
    *,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """o: squared length of the projections of a token's expert outputs on each other.

    y: (T, k, D) outputs of each token's chosen experts before the gate weight; or (R, D) with rows: (T, k) int64. variant
    "paper": mean over tokens of the sum over ordered pairs of `|| <a,b> / (<b,b> + eps) b ||^2`. variant "code": mean over
    tokens and chosen experts of the squared length of the projection on the span of the other chosen experts' outputs.
    Raises ValueError for an unknown variant. Source: Guo et al., "Advancing Expert Specialization for Better MoE", Eq. 6, and
    their published code.
    """
    rows, y = token_rows(y, rows)
    gram = token_gram(y, rows)
    if variant == "paper":
        return weighted_sum(squared_projections(gram, eps), weights)
    if variant == "code":
        return weighted_sum(squared_span_projections(gram), weights)
    raise ValueError(f"orthogonality_loss: variant={variant!r} is not one of 'paper', 'code'")


def routing_variance_loss(
    gates: Tensor, variant: str = "paper", mean: Tensor | None = None, *, weights: Tensor | None = None
) -> Tensor:
    """v: minus the variance of the gate weights.

    gates: (T, E), normalised by the caller to sum to 1 over the chosen experts, 0 elsewhere; a leading dimension (B, S, E)
    forms the means per sequence. variant "paper": over tokens, `- mean_i (1/E) sum_e (g_ie - mean_i g_ie)^2`. mean: (E,) taken
    elsewhere (over all ranks). variant "code": over experts, minus the mean over tokens of the unbiased variance of the E
    weights (0 for one expert). Raises ValueError for an unknown variant. Source: Guo et al., Eq. 7, and their published code.
    """
    gates = _accumulate(gates)
    if weights is None:
        weights = mean_weights(gates, gates.shape[:-1])
    weights = weights.to(gates.dtype)
    experts = gates.shape[-1]
    if variant == "paper":
        if mean is None:
            mean = weighted_mean(gates, weights, None)
        # The mean's own gradient vanishes, since deviations from it sum to 0.
        deviations = gates - mean.detach().to(gates.dtype).unsqueeze(-2)
        return -(deviations.square().mean(-1) * weights).sum()
    if variant == "code":
        deviations = gates - gates.mean(-1, keepdim=True)
        return -(deviations.square().sum(-1) * weights).sum() / max(experts - 1, 1)
    raise ValueError(f"routing_variance_loss: variant={variant!r} is not one of 'paper', 'code'")


def weighted_mean(values: Tensor, weights: Tensor, group: Group | None) -> Tensor:
    """Mean over the tokens of all ranks of the group, weights normalised to sum to 1; no gradient.

    (..., T, E), (..., T) -> (..., E); 0 where no token has weight.
    """
    sums = (weights.unsqueeze(-2) @ values.detach()).squeeze(-2)
    sums, total = all_sum(torch.cat([sums, weights.sum(-1, keepdim=True)], dim=-1), group).split(
        [values.shape[-1], 1], -1
    )
    return sums / torch.where(total > 0, total, 1.0)


@torch.no_grad()
def coupling_noise_bound(router_weight: Tensor) -> Tensor:
    """eps_i of erc: half the distance to the nearest other routing vector over the own length, (E, D) -> (E,)."""
    if native.direct(router_weight, half=False):
        return native.coupling_bounds(router_weight)
    distances = torch.cdist(router_weight, router_weight, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    return distances.amin(1) / (2.0 * router_weight.norm(dim=1)).clamp(min=torch.finfo(router_weight.dtype).tiny)


def coupling_noise(router_weight: Tensor, uniform: Tensor) -> Tensor:
    """erc's delta ~ U(1 - eps_i, 1 + eps_i) from uniform numbers in [0, 1): (E, D), (E, D) -> (E, D)."""
    bound = coupling_noise_bound(router_weight).unsqueeze(1)
    return torch.addcmul(1.0 - bound, uniform, 2.0 * bound)


def expert_router_coupling_loss(
    router_weight: Tensor,
    gate_weight: Tensor,
    alpha: float = 1.0,
    noise: Tensor | None = None,
    detach_router: bool = False,
) -> Tensor:
    """erc: every expert should answer its own routing vector more strongly than others, and than others answer it.

    `M[i,j] = || W_gate^j (R_i * delta_i) ||`; the loss is
    `(1/E^2) sum_i sum_{j != i} max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0)`. router_weight: R (E, D). gate_weight:
    (E, F, D). noise: delta (E, D); drawn from torch's global generator when not given (no gradient passes through its bound).
    detach_router: no gradient into R. Raises ValueError for one expert or a negative alpha. Source: Lv et al.
    """
    experts = router_weight.shape[0]
    if experts < 2:
        raise ValueError("expert_router_coupling_loss: needs at least two experts")
    if alpha < 0:
        raise ValueError(f"expert_router_coupling_loss: alpha={alpha} is negative")
    router_weight = _accumulate(router_weight)
    if noise is None:
        noise = coupling_noise(router_weight, torch.rand_like(router_weight))
    if detach_router:
        router_weight = router_weight.detach()
    proxies = router_weight * noise.to(router_weight.dtype)
    return coupling_excess(coupling_matrix(proxies, gate_weight), alpha)


def coupling_excess(matrix: Tensor, alpha: float) -> Tensor:
    """erc from its activation matrix M (E, E): `(1/E^2) sum_{i != j} max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0)`."""
    if native.direct(matrix, half=False):
        return (native.excess_slopes(matrix.detach(), alpha) * matrix).sum()
    experts = matrix.shape[0]
    identity = torch.eye(experts, dtype=torch.bool, device=matrix.device)
    diagonal = alpha * torch.where(identity, matrix, 0.0).sum(1, keepdim=True)  # as squared_norms, and for its reason
    excess = (matrix - diagonal).relu() + (matrix.t() - diagonal).relu()
    return (excess * ~identity).sum() / experts**2


def coupling_matrix(proxies: Tensor, gate_weight: Tensor) -> Tensor:
    """erc's M: lengths of every expert's gate activation of every proxy token, (E, D), (E, F, D) -> (E, E).

    The gradient of a zero activation is 0.
    """
    gate_weight = _accumulate(gate_weight)
    activations_jiF = torch.matmul(proxies, gate_weight.transpose(1, 2))
    return lengths(activations_jiF.square().sum(-1).t())
