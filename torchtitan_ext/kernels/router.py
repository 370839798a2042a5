"""The router after its product: choice of experts, scores, gate weights, and the sums that loss terms and measures take.

T tokens, E experts, K experts per token (k). A program computes TOKENS rows of the (T, E) logits, in float32. Sums over
tokens are one partial sum per program, added afterwards: there are no atomics, and results are deterministic.

Scores that sum to 1 are a softmax in both cases: of the logits, or of the logarithms of the sigmoids. So are gate weights
that sum to 1, over the chosen experts only. That leaves no division that could underflow.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

WARPS = 4


@triton.jit
def _load(logits, token, here, expert, E: tl.constexpr):
    """The logits of a program's tokens, -inf in columns that are no expert."""
    real = (expert < E)[None, :]
    at = token[:, None].to(tl.int64) * E + expert[None, :]
    q = tl.load(logits + at, mask=here[:, None] & real, other=0.0)
    return tl.where(real, q, float("-inf")), real


@triton.jit
def _softmax(q):
    """Log-sum-exp (t,) and softmax (t, e)."""
    highest = tl.max(q, 1)
    powers = tl.exp(q - highest[:, None])
    total = tl.sum(powers, 1)
    return highest + tl.log(total), powers / total[:, None]


@triton.jit
def _scores(q, real, SIGMOID: tl.constexpr):
    """Log-sum-exp and softmax of the logits, raw scores, their logarithms up to a constant, and scores that sum to 1."""
    lse, soft = _softmax(q)
    raw = soft
    logs = q
    score = soft
    if SIGMOID:
        raw = tl.where(real, 1.0 / (1.0 + tl.exp(-q)), 0.0)
        logs = tl.where(real, tl.minimum(q, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(q))), float("-inf"))
        _, score = _softmax(logs)
    return lse, soft, raw, logs, score


@triton.jit
def _largest(key, expert, K: tl.constexpr):
    """Where the k largest of each row are, ties to the left: (t, e) of 0 and 1."""
    found = tl.zeros(key.shape, dtype=tl.int32)
    for _ in tl.static_range(K):
        best = tl.argmax(key, 1)
        hit = expert[None, :] == best[:, None]
        found += hit.to(tl.int32)
        key = tl.where(hit, float("-inf"), key)
    return found


@triton.jit(do_not_specialize=["tokens"])
def choose_kernel(
    logits,  # (T, E) float32
    bias,  # (E,) float32, added to the scores
    ids,  # (T, K) int64 out: the k largest, largest first
    tokens,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    TOKENS: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EP)
    here = token < tokens
    q, real = _load(logits, token, here, expert, E)
    if SIGMOID:
        raw = 1.0 / (1.0 + tl.exp(-q))
    else:
        _, raw = _softmax(q)
    key = raw + tl.load(bias + expert, mask=expert < E, other=0.0)[None, :]
    key = tl.where(key == key, key, float("inf"))  # NaN is the largest, as for torch.topk: an index that exists
    key = tl.where(real, key, float("-inf"))
    choice = tl.arange(0, KP)
    number = tl.zeros((TOKENS, KP), dtype=tl.int32)
    for a in tl.static_range(K):
        best = tl.argmax(key, 1)
        number = tl.where(choice[None, :] == a, best[:, None], number)
        key = tl.where(expert[None, :] == best[:, None], float("-inf"), key)
    mask = here[:, None] & (choice < K)[None, :]
    tl.store(ids + token[:, None].to(tl.int64) * K + choice[None, :], number.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    logits,  # (T, E) float32
    ids,  # (T, K) int64: the chosen experts
    weights,  # (T,) float32, 0 for a token without label
    scores,  # (T, E) float32 out, sums of 1
    gates,  # (T, K) float32 out
    lse,  # (T,) out: log-sum-exp of the logits
    entropy,  # (T,) out, of the scores
    largest_mass,  # (T,) out: sum of the k largest scores
    chosen_mass,  # (T,) out: sum of the chosen experts' scores
    counts,  # (programs, E) int32 out: assignments of labelled tokens
    shares,  # (programs, E) float32 out: weighted sums of the scores over tokens
    tokens,
    route_scale,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    TOKENS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    route_scale = tl.cast(route_scale, tl.float32)
    program = tl.program_id(0)
    token = program * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EP)
    here = token < tokens
    q, real = _load(logits, token, here, expert, E)
    log_sum, _, raw, logs, score = _scores(q, real, SIGMOID)
    at = token[:, None].to(tl.int64) * E + expert[None, :]
    tl.store(scores + at, score, mask=here[:, None] & real)
    tl.store(lse + token, log_sum, mask=here)
    tl.store(entropy + token, -tl.sum(score * tl.log(tl.where(score > 0, score, 1.0)), 1), mask=here)

    choice = tl.arange(0, KP)
    gate = tl.full((TOKENS, KP), float("-inf"), tl.float32)
    found = tl.zeros((TOKENS, EP), dtype=tl.int32)
    for a in tl.static_range(K):
        best = tl.load(ids + token.to(tl.int64) * K + a, mask=here, other=0).to(tl.int32)
        hit = expert[None, :] == best[:, None]
        found += hit.to(tl.int32)
        if NORMALIZE:
            one = tl.sum(tl.where(hit, logs, 0.0), 1)
        else:
            one = tl.sum(tl.where(hit, raw, 0.0), 1)
        gate = tl.where(choice[None, :] == a, one[:, None], gate)
    if NORMALIZE:
        _, gate = _softmax(gate)
    out = here[:, None] & (choice < K)[None, :]
    tl.store(gates + token[:, None].to(tl.int64) * K + choice[None, :], gate * route_scale, mask=out)
    largest = _largest(tl.where(real, score, float("-inf")), expert, K)
    tl.store(largest_mass + token, tl.sum(tl.where(largest > 0, score, 0.0), 1), mask=here)
    tl.store(chosen_mass + token, tl.sum(tl.where(found > 0, score, 0.0), 1), mask=here)

    weight = tl.load(weights + token, mask=here, other=0.0)
    labelled = tl.where((weight > 0)[:, None], found, 0)
    tl.store(counts + program * E + expert, tl.sum(labelled, 0), mask=expert < E)
    tl.store(shares + program * E + expert, tl.sum(score * weight[:, None], 0), mask=expert < E)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    logits,
    ids,
    weights,
    d_scores,  # (T, E), read if HAS_SCORES
    d_gates,  # (T, K), read if HAS_GATES
    d_lse,  # (T,), read if HAS_LSE
    d_largest_mass,  # (T,), read if HAS_MASS
    d_shares,  # (E,), read if HAS_SHARES
    d_logits,  # (T, E) out
    tokens,
    route_scale,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_GATES: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_SHARES: tl.constexpr,
):
    """All derivatives pass through the logarithms of the raw scores, up to a constant per token."""
    route_scale = tl.cast(route_scale, tl.float32)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EP)
    here = token < tokens
    q, real = _load(logits, token, here, expert, E)
    _, soft, raw, logs, score = _scores(q, real, SIGMOID)
    at = token[:, None].to(tl.int64) * E + expert[None, :]
    d_score = tl.zeros((TOKENS, EP), dtype=tl.float32)
    d_log = tl.zeros((TOKENS, EP), dtype=tl.float32)
    if HAS_SCORES:
        d_score += tl.load(d_scores + at, mask=here[:, None] & real, other=0.0)
    if HAS_SHARES:
        weight = tl.load(weights + token, mask=here, other=0.0)
        d_score += weight[:, None] * tl.load(d_shares + expert, mask=expert < E, other=0.0)[None, :]
    if HAS_MASS:
        largest = _largest(tl.where(real, score, float("-inf")), expert, K)
        d_score += tl.where(largest > 0, tl.load(d_largest_mass + token, mask=here, other=0.0)[:, None], 0.0)
    if HAS_GATES:
        d_gate = tl.zeros((TOKENS, EP), dtype=tl.float32)
        chosen = tl.zeros((TOKENS, EP), dtype=tl.int32)
        for a in tl.static_range(K):
            best = tl.load(ids + token.to(tl.int64) * K + a, mask=here, other=0).to(tl.int32)
            hit = expert[None, :] == best[:, None]
            chosen += hit.to(tl.int32)
            d = tl.load(d_gates + token.to(tl.int64) * K + a, mask=here, other=0.0) * route_scale
            d_gate += tl.where(hit, d[:, None], 0.0)
        if NORMALIZE:
            _, gate = _softmax(tl.where(chosen > 0, logs, float("-inf")))
            d_log += gate * (d_gate - tl.sum(gate * d_gate, 1)[:, None])
        elif SIGMOID:
            d_log += raw * d_gate
        else:
            d_score += d_gate
    d_log += score * (d_score - tl.sum(score * d_score, 1)[:, None])
    if SIGMOID:
        d_log *= 1.0 - raw
    if HAS_LSE:
        d_log += soft * tl.load(d_lse + token, mask=here, other=0.0)[:, None]
    tl.store(d_logits + at, d_log, mask=here[:, None] & real)


def sizes(experts: int, k: int) -> dict[str, int]:
    """The kernels' constants. Fewer tokens per program where there are many experts, so that rows stay in registers."""
    padded = triton.next_power_of_2(experts)
    return {"E": experts, "EP": padded, "K": k, "TOKENS": _tokens_per_program(experts)}


def _tokens_per_program(experts: int) -> int:
    return max(1, min(8, 512 // int(triton.next_power_of_2(experts))))


def programs(tokens: int, experts: int) -> int:
    """Programs of a launch, which are the rows of `counts` and `shares`."""
    return int(triton.cdiv(tokens, _tokens_per_program(experts)))


def choose(logits_TE: Tensor, bias_E: Tensor, ids_TK: Tensor, sigmoid: bool) -> None:
    """Writes the chosen experts. All contiguous."""
    (tokens, experts), k = logits_TE.shape, ids_TK.shape[1]
    if tokens:
        with torch.cuda.device_of(logits_TE):
            choose_kernel[(programs(tokens, experts),)](
                logits_TE, bias_E, ids_TK, tokens, **sizes(experts, k), KP=triton.next_power_of_2(k), SIGMOID=sigmoid,
                num_warps=WARPS,
            )  # fmt: skip


def forward(
    logits_TE: Tensor,
    ids_TK: Tensor,
    weights_T: Tensor,
    out: tuple[Tensor, ...],
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> None:
    """Writes scores, gates, lse, entropy, largest_mass, chosen_mass, counts and shares. All contiguous."""
    (tokens, experts), k = logits_TE.shape, ids_TK.shape[1]
    if tokens:
        with torch.cuda.device_of(logits_TE):
            forward_kernel[(programs(tokens, experts),)](
                logits_TE, ids_TK, weights_T, *out, tokens, scale, **sizes(experts, k), KP=triton.next_power_of_2(k),
                SIGMOID=sigmoid, NORMALIZE=normalize, num_warps=WARPS,
            )  # fmt: skip


def backward(
    logits_TE: Tensor,
    ids_TK: Tensor,
    weights_T: Tensor,
    gradients: tuple[Tensor | None, ...],
    d_logits_TE: Tensor,
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> None:
    """Writes the gradient of the logits. gradients: of scores, gates, lse, largest_mass and shares. All contiguous."""
    (tokens, experts), k = logits_TE.shape, ids_TK.shape[1]
    names = ("HAS_SCORES", "HAS_GATES", "HAS_LSE", "HAS_MASS", "HAS_SHARES")
    given = {name: x is not None for name, x in zip(names, gradients, strict=True)}
    if tokens:
        with torch.cuda.device_of(logits_TE):
            backward_kernel[(programs(tokens, experts),)](
                logits_TE, ids_TK, weights_T, *(weights_T if x is None else x for x in gradients), d_logits_TE, tokens,
                scale, **sizes(experts, k), SIGMOID=sigmoid, NORMALIZE=normalize, **given, num_warps=WARPS,
            )  # fmt: skip
