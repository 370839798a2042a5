"""The loop over new tokens, for a batch of texts of different lengths. A text that has ended leaves the batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from titan_moe.data.tokenizer import Tokenizer
from titan_moe.generate.cache import KeyValueCache, extend
from titan_moe.generate.sampling import Draws, Sampling, choose
from titan_moe.generate.text import StopStrings, TextStream
from titan_moe.model.transformer import Transformer


class Options(NamedTuple):
    max_tokens: int = 128
    """New tokens per text, at most."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these in its new part."""
    seed: int = 0
    sampling: Sampling = Sampling()


class Piece(NamedTuple):
    """A part of one text."""

    text_number: int
    text: str
    tokens: int
    """New tokens of this text so far, also those whose text is not complete yet."""
    ended: str = ""
    """Why the text ended: "eos" (the model's end of a document), "stop" (a stop string), "length"; "whole": this piece is the
    whole text, made on another rank perhaps; "": it goes on."""


class _Text:
    """A text that is being made."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], options: Options) -> None:
        self.eos, self.max_tokens = tokenizer.eos, options.max_tokens
        self.stream, self.stops = TextStream(tokenizer, prompt), StopStrings(options.stop)
        self.tokens = 0

    def push(self, token: int) -> tuple[str, str]:
        """The new characters, and why the text ends with this token, if it does."""
        if token == self.eos:
            return self._rest("eos")
        self.tokens += 1
        shown = self.stops.push(self.stream.push(token))
        if self.stops.found:
            return shown, "stop"
        if self.tokens == self.max_tokens:
            rest, ended = self._rest("length")
            return shown + rest, ended
        return shown, ""

    def _rest(self, ended: str) -> tuple[str, str]:
        shown = self.stops.push(self.stream.finish())
        return (shown, "stop") if self.stops.found else (shown + self.stops.finish(), ended)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: Options,
    anywhere: Callable[[bool], bool] = lambda here: here,
    agreed: Callable[[list[int]], list[int]] = list,
    equal_before: Sequence[int] | None = None,
) -> Iterator[Piece]:
    """Continues texts, all in one batch, and yields every part as it is made; each text's last piece says why it ended.

    model: on one rank; or spread over ranks that each continue their own texts; or, by `replicate_tokens`, over ranks that
    continue the same texts. prompts: the tokens of each text, at least one; a document starts with `tokenizer.bos`. anywhere:
    whether a condition holds on any rank, for ranks with their own texts. agreed: makes chosen tokens the same on all ranks.
    equal_before: as for `Draws`."""
    device, vocabulary = model.embedding.device, model.settings.vocab_size
    cache, draws = KeyValueCache(len(prompts), device), Draws(options.seed, prompts, equal_before)
    texts = [_Text(tokenizer, prompt, options) for prompt in prompts]
    running, new = list(range(len(prompts))), [list(prompt) for prompt in prompts]
    seen_BV = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen_BV[row, list(prompt)] = True
    while anywhere(bool(running)):
        if not running:  # other ranks go on, and wait for this one in the model's collectives
            extend(model, KeyValueCache(1, device), [[tokenizer.bos]])
            continue
        logits_BV = extend(model, cache, new)
        chosen = agreed(choose(logits_BV, seen_BV, options.sampling, draws, running))
        kept = []
        for row, (number, token) in enumerate(zip(running, chosen, strict=True)):
            shown, ended = texts[number].push(token)
            if shown or ended:
                yield Piece(number, shown, texts[number].tokens, ended)
            if not ended:
                kept.append(row)
        new = [[chosen[row]] for row in kept]
        if len(kept) < len(running) and kept:
            cache.keep(kept)
            seen_BV = seen_BV[kept]
        running = [running[row] for row in kept]
        seen_BV[range(len(running)), [ids[0] for ids in new]] = True


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: Options,
    anywhere: Callable[[bool], bool] = lambda here: here,
    equal_before: Sequence[int] | None = None,
) -> list[str]:
    """The new part of each text. anywhere, equal_before: as for `generate`."""
    texts = [""] * len(prompts)
    for piece in generate(model, tokenizer, prompts, options, anywhere, equal_before=equal_before):
        texts[piece.text_number] += piece.text
    return texts
