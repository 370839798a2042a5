"""Log-likelihoods of token sequences: what both the tasks and the perplexity of texts are computed from."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from titan_moe.data.corpora import open_corpus
from titan_moe.data.prepare import cache_root
from titan_moe.generate.cache import inference_inputs
from titan_moe.generate.load import Loaded
from titan_moe.model.transformer import Transformer
from torchtitan_ext.dtypes import accumulation_dtype


class Scored(NamedTuple):
    """Tokens to score, after a context of at least one token."""

    context: Sequence[int]
    continuation: Sequence[int]


@torch.no_grad()
def log_likelihoods(
    model: Transformer, requests: Sequence[Scored], max_length: int, batch_size: int
) -> list[tuple[float, bool]]:
    """Of each continuation: its log-probability in nats, and whether every token of it is the most probable one.

    Of a longer text only the last `max_length` + 1 tokens are used. Texts of similar length share a batch."""
    results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    order = sorted(range(len(requests)), key=lambda n: -len(requests[n].context) - len(requests[n].continuation))
    device = model.embedding.device
    for start in range(0, len(order), batch_size):
        numbers = [n for n in order[start : start + batch_size] if requests[n].continuation]
        rows = [[*requests[n].context, *requests[n].continuation][-max_length - 1 :] for n in numbers]
        if not rows:
            continue
        longest = max(map(len, rows)) - 1
        tokens_BS = torch.tensor([[*ids[:-1], *[0] * (longest + 1 - len(ids))] for ids in rows], device=device)
        scored = [min(len(requests[n].continuation), len(ids) - 1) for n, ids in zip(numbers, rows, strict=True)]
        chosen = [
            row * longest + position
            for row, (ids, count) in enumerate(zip(rows, scored, strict=True))
            for position in range(len(ids) - 1 - count, len(ids) - 1)
        ]
        labels_N = torch.tensor(
            [token for ids, count in zip(rows, scored, strict=True) for token in ids[len(ids) - count :]], device=device
        )
        positions_BS = torch.arange(longest, device=device).expand(len(rows), -1)
        inputs = inference_inputs(tokens_BS, positions_BS)
        logits_NV = model.logits(inputs, torch.tensor(chosen, device=device))
        log_probs_NV = logits_NV.to(accumulation_dtype(logits_NV.dtype)).log_softmax(1)
        values = log_probs_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1).to(torch.float64).split(scored)
        greedy = (log_probs_NV.argmax(1) == labels_N).split(scored)
        for n, value, hit in zip(numbers, values, greedy, strict=True):
            results[n] = (float(value.sum()), bool(hit.all()))
    return results


class TextLoss(NamedTuple):
    """The loss on a text, by file and domain."""

    file: str
    domain: str
    documents: int
    tokens: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    """Bits per byte of UTF-8 text."""


def windows(ids: Sequence[int], first: int, max_length: int) -> Iterator[Scored]:
    """A document in parts of `max_length` tokens, each token scored once. first: the token before the document."""
    for start in range(0, len(ids), max_length):
        yield Scored([ids[start - 1] if start else first], ids[start : start + max_length])


def text_losses(loaded: Loaded, sources: Iterable[str], limit: int, batch_size: int) -> list[TextLoss]:
    """Losses of files, folders or named corpora. limit: documents of each; 0: all. Raises UserError."""
    config, tokenizer = loaded.config, loaded.tokenizer
    results = []
    for source in sources:
        corpus = open_corpus(source, "--text", cache_root(config), config.data.text_column)
        parts: dict[str, list[tuple[list[int], int]]] = {}
        for number, document in enumerate(corpus.documents()):
            if limit and number == limit:
                break
            ids = tokenizer.encode(document.text)
            parts.setdefault(document.domain, []).append((ids, len(document.text.encode("utf-8"))))
        for domain, documents in parts.items():
            length = config.training.seq_len
            rows = [row for ids, _ in documents for row in windows(ids, tokenizer.bos, length)]
            nats = -sum(value for value, _ in log_likelihoods(loaded.model, rows, length, batch_size))
            tokens, size = sum(len(ids) for ids, _ in documents), sum(size for _, size in documents)
            loss = nats / max(tokens, 1)
            bits = nats / math.log(2) / max(size, 1)
            perplexity = math.exp(min(loss, 700.0))
            results.append(TextLoss(source, domain, len(documents), tokens, loss, perplexity, bits))
    return results
