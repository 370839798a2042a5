"""Every sampling rule against Hugging Face's, and the draw against the probabilities."""

import pytest
import torch

from titan_moe.generate.sampling import Draws, Sampling, choose, filtered, inverse_cdf, penalize_repetition

SOURCE = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(5, 30, generator=SOURCE)
TEXTS = torch.randint(0, 30, (5, 6), generator=SOURCE)
SEEN = torch.zeros(5, 30, dtype=torch.bool).scatter(1, TEXTS, True)
RULES = [
    Sampling(),
    Sampling(repetition_penalty=1.7),
    Sampling(temperature=0.6),
    Sampling(top_k=4),
    Sampling(top_k=99),
    Sampling(top_p=0.8),
    Sampling(top_p=1e-9),
    Sampling(min_p=0.2),
    Sampling(min_p=1.0),
    Sampling(repetition_penalty=0.5, temperature=1.4, top_k=12, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_rule_gives_the_logits_of_transformers(rules: Sampling) -> None:
    transformers = pytest.importorskip("transformers")
    processors = transformers.LogitsProcessorList()
    if rules.repetition_penalty != 1:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(rules.repetition_penalty))
    processors.append(transformers.TemperatureLogitsWarper(rules.temperature))
    if rules.top_k:
        processors.append(transformers.TopKLogitsWarper(rules.top_k))
    if rules.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(rules.top_p))
    if rules.min_p:
        processors.append(transformers.MinPLogitsWarper(rules.min_p))
    torch.testing.assert_close(filtered(LOGITS, SEEN, rules), processors(TEXTS, LOGITS.clone()), rtol=1e-6, atol=0)


def test_temperature_0_takes_the_largest_logit() -> None:
    rules = Sampling(temperature=0.0, repetition_penalty=1.5)
    wanted = penalize_repetition(LOGITS, SEEN, 1.5).argmax(1).tolist()
    assert choose(LOGITS, SEEN, rules, Draws(0, TEXTS.tolist()), range(5)) == wanted


def test_the_drawn_token_is_where_the_cumulative_probability_passes_u() -> None:
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]] * 6, dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1.0], dtype=torch.float64)
    assert inverse_cdf(probabilities, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_draws_have_the_probabilities() -> None:
    """4,000 draws: each frequency within five standard deviations, sqrt(p (1 - p) / n) < 0.0079."""
    probabilities = LOGITS[:1].to(torch.float64).softmax(1)
    draws = Draws(1, [[1, 2]])
    uniform = torch.cat([draws.next([0]) for _ in range(4000)])
    counts = inverse_cdf(probabilities.expand(4000, -1), uniform).bincount(minlength=30)
    torch.testing.assert_close(counts / 4000, probabilities[0], rtol=0, atol=0.04, check_dtype=False)


def test_an_excluded_token_is_never_drawn() -> None:
    rules, draws = Sampling(top_k=3), Draws(0, [[1]])
    allowed = set(LOGITS[0].topk(3).indices.tolist())
    drawn = {choose(LOGITS[:1], SEEN[:1], rules, draws, [0])[0] for _ in range(200)}
    assert drawn == allowed
