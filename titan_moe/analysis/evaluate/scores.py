"""Log-likelihoods of token sequences: what both the tasks and the perplexity of texts are computed from."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_moe.data.corpora import open_corpus
from titan_moe.data.prepare import cache_root
from titan_moe.generate.buckets import own_batches
from titan_moe.generate.cache import inference_inputs
from titan_moe.generate.load import Loaded
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.context import context_shard
from titan_moe.parallel.mesh import Mesh
from torchtitan_ext.collectives import all_sum
from torchtitan_ext.dtypes import accumulation_dtype


class Scored(NamedTuple):
    """Tokens to score, after a context of at least one token."""

    context: Sequence[int]
    continuation: Sequence[int]


class Batches(NamedTuple):
    """How texts are put into batches, and the ranks that share them."""

    size: int
    """Texts in a batch of one rank."""
    length: int
    """Tokens of a text, at most."""
    mesh: Mesh
    """Ranks of one data rank (tensor and context parallelism) work on the same texts; the others take other texts."""
    full: bool = False
    """Pad every batch to `size` texts of `length` tokens: a compiled model then sees one shape, that of training."""
    progress: Callable[[], None] = lambda: None
    """Called before every batch."""
    by_router: bool = False
    """Texts go to the ranks that hold the experts of their first router, instead of to the ranks in turn."""


@torch.no_grad()
def log_likelihoods(model: Transformer, requests: Sequence[Scored], batches: Batches) -> list[tuple[float, bool]]:
    """Of each continuation: its log-probability in nats, and whether every token of it is the most probable one.

    Of a longer text only the last `batches.length` + 1 tokens are used. Texts of similar length share a batch. A collective:
    all ranks call it with the same requests, run the model equally often, and get the same results."""
    mesh = batches.mesh
    order = [n for n in range(len(requests)) if requests[n].continuation]
    order.sort(key=lambda n: -len(requests[n].context) - len(requests[n].continuation))
    sums_N2 = torch.zeros(len(requests), 2, dtype=torch.float64, device=mesh.device)
    texts = [text_of(one, batches.length)[:-1] for one in requests]
    for numbers in own_batches(texts, order, batches.size, mesh, model if batches.by_router else None):
        batches.progress()
        sums_B2 = score_batch(model, [requests[n] for n in numbers], batches)
        sums_N2[numbers] = sums_B2[: len(numbers)]
    sums_N2 = all_sum(sums_N2, mesh.ranks.data)
    return [(value, missed == 0) for value, missed in sums_N2.tolist()]


def text_of(request: Scored, length: int) -> list[int]:
    """The last `length` + 1 tokens of a text: as many inputs, and the label of the last one."""
    return [*request.context, *request.continuation][-length - 1 :]


def score_batch(model: Transformer, requests: Sequence[Scored], batches: Batches) -> Tensor:
    """Of each text, the sum of its scored tokens' log-probabilities, and how many of these are not the most probable: (B, 2).

    Under context parallelism: of the tokens on this rank. Without texts, as on a rank that has none left, a text of padding
    is run, because the others wait in the model's collectives."""
    degrees, device = batches.mesh.degrees, batches.mesh.device
    texts = [text_of(one, batches.length) for one in requests]
    counts = [min(len(one.continuation), len(ids) - 1) for one, ids in zip(requests, texts, strict=True)]
    rows = batches.size if batches.full else max(len(texts), 1)
    multiple = degrees.tp * (2 * degrees.cp if degrees.cp > 1 else 1)
    longest = batches.length if batches.full else max(map(len, texts), default=2) - 1
    longest = -(-longest // multiple) * multiple
    tokens_BS = torch.zeros(rows, longest, dtype=torch.int64)
    labels_BS = torch.full((rows, longest), -1)
    for row, (ids, count) in enumerate(zip(texts, counts, strict=True)):
        tokens_BS[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels_BS[row, len(ids) - 1 - count : len(ids) - 1] = torch.tensor(ids[len(ids) - count :])
    positions_BS = torch.arange(longest, device=device).expand(rows, -1)
    inputs = inference_inputs(tokens_BS.to(device), positions_BS)._replace(labels=labels_BS.to(device))
    inputs = context_shard(inputs, degrees.cp, batches.mesh.cp_rank)
    scored_BS = inputs.labels >= 0
    logits_NV = model.logits(inputs, scored_BS.flatten().nonzero().squeeze(1))
    labels_N1 = inputs.labels[scored_BS].unsqueeze(1)
    log_probs_NV = logits_NV.to(accumulation_dtype(logits_NV.dtype)).log_softmax(1)
    values = log_probs_NV.gather(1, labels_N1).squeeze(1).to(torch.float64)
    missed = (log_probs_NV.argmax(1) != labels_N1.squeeze(1)).to(torch.float64)
    parts = torch.stack([values, missed], 1).split(scored_BS.sum(1).tolist())
    return torch.stack([part.sum(0) for part in parts])


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
            batches = Batches(batch_size, length, loaded.mesh, by_router=loaded.placed)
            nats = -sum(value for value, _ in log_likelihoods(loaded.model, rows, batches))
            tokens, size = sum(len(ids) for ids, _ in documents), sum(size for _, size in documents)
            loss = nats / max(tokens, 1)
            bits = nats / math.log(2) / max(size, 1)
            perplexity = math.exp(min(loss, 700.0))
            results.append(TextLoss(source, domain, len(documents), tokens, loss, perplexity, bits))
    return results
