"""How the next token is chosen from logits, and where the random numbers come from.

B rows, V vocabulary. A token that a rule excludes has logit -inf. The rules apply in the order of the fields of `Sampling`,
which is Hugging Face's.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    repetition_penalty: float = 1.0
    """Logits of tokens that are in the text are divided by this if positive, else multiplied; 1: off."""
    temperature: float = 1.0
    """Logits are divided by this; 0: the token with the largest logit, and no other rule matters."""
    top_k: int = 0
    """Only this many tokens with the largest logits; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens whose probabilities first sum to this or more; 1: all."""
    min_p: float = 0.0
    """Only tokens with at least this fraction of the largest probability; 0: all."""


def filtered(logits_BV: Tensor, seen_BV: Tensor, rules: Sampling) -> Tensor:
    """The logits to sample from, (B, V). seen_BV: bool, the tokens that are in each row's text. temperature: above 0."""
    logits_BV = penalize_repetition(logits_BV, seen_BV, rules.repetition_penalty) / rules.temperature
    return keep_min_p(keep_top_p(keep_top_k(logits_BV, rules.top_k), rules.top_p), rules.min_p)


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Source: CTRL (Keskar et al. 2019), section 4.1, with Hugging Face's rule for negative logits."""
    if penalty == 1.0:
        return logits_BV
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keeps the k largest logits of each row, and those equal to the k-th."""
    if k == 0:
        return logits_BV
    smallest_B1 = logits_BV.topk(min(k, logits_BV.shape[1]), dim=1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Nucleus sampling: keeps the fewest tokens, in order of probability, with p or more in sum; at least one.

    Source: Holtzman et al. 2020, section 3.1."""
    if p >= 1.0:
        return logits_BV
    ascending, order = logits_BV.sort(dim=1)
    removed = ascending.softmax(1).cumsum(1) <= 1 - p
    removed[:, -1] = False
    return logits_BV.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), -torch.inf)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Source: Nguyen et al. 2024, min-p sampling."""
    if p == 0.0:
        return logits_BV
    probabilities = logits_BV.softmax(1)
    return logits_BV.masked_fill(probabilities < p * probabilities.amax(1, keepdim=True), -torch.inf)


def earlier_equal(texts: Sequence[Sequence[int]]) -> list[int]:
    """For each text, how many before it are equal to it."""
    seen: dict[tuple[int, ...], int] = {}
    counts = []
    for ids in map(tuple, texts):
        counts.append(seen.get(ids, 0))
        seen[ids] = counts[-1] + 1
    return counts


class Draws:
    """Uniform numbers, a sequence of its own per text: a text does not depend on what else is in its batch."""

    def __init__(self, seed: int, texts: Sequence[Sequence[int]], equal_before: Sequence[int] | None = None) -> None:
        """texts: their first tokens. The n-th of equal texts has other numbers than the first. equal_before: how many texts
        before each are equal to it, where these texts are only some; None: counted."""
        self.generators = []
        counts = earlier_equal(texts) if equal_before is None else equal_before
        for ids, before in zip(map(tuple, texts), counts, strict=True):
            key = hashlib.sha256(repr((seed, ids, before)).encode()).digest()
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1))

    def next(self, texts: Sequence[int]) -> Tensor:
        """The next number in [0, 1) of each of these texts, (B,) float64."""
        numbers = [torch.rand((), generator=self.generators[text], dtype=torch.float64) for text in texts]
        return torch.stack(numbers)


def choose(logits_BV: Tensor, seen_BV: Tensor, rules: Sampling, draws: Draws, texts: Sequence[int]) -> list[int]:
    """The next token of each row. texts: the rows' texts, by which `draws` numbers them."""
    if rules.temperature == 0.0:
        return penalize_repetition(logits_BV, seen_BV, rules.repetition_penalty).argmax(1).tolist()
    probabilities = filtered(logits_BV.to(torch.float64), seen_BV, rules).softmax(1)
    return inverse_cdf(probabilities, draws.next(texts).to(logits_BV.device)).tolist()


def inverse_cdf(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token, in order of number, whose cumulative probability is above u: (B,)."""
    cumulative = probabilities_BV.cumsum(1)
    # Rounding may leave the sum below u; then the last token that has a probability is taken.
    target = (uniform_B.unsqueeze(1) * cumulative[:, -1:]).clamp(max=cumulative[:, -1:])
    last_B = probabilities_BV.shape[1] - 1 - (probabilities_BV > 0).flip(1).int().argmax(1)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True).squeeze(1), last_B)
