"""From tokens to text as they come: complete characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\ufffd"  # what tokenizers decode the first bytes of a character to


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


class TextStream:
    """The text of new tokens, as soon as its characters are complete."""

    def __init__(self, tokenizer: Decoder, context: Sequence[int]) -> None:
        """context: the tokens before. The last of them are decoded too, since a space may depend on what stands before."""
        self.tokenizer = tokenizer
        self.ids = list(context[-8:])
        self.start, self.end = 0, len(self.ids)
        """Text of tokens before `end` has been returned; decoding starts at token `start`."""

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        self.ids.append(token)
        return self._taken(complete=True)

    def finish(self) -> str:
        """What is left: a character that was never completed, as replacement characters."""
        return self._taken(complete=False)

    def _taken(self, complete: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.end])
        text = self.tokenizer.decode(self.ids[self.start :])
        if len(text) <= len(before) or (complete and text.endswith(UNFINISHED)):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return text[len(before) :]


class StopStrings:
    """Cuts a text before the first stop string in it, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown; nothing once a stop string was found."""
        if self.found:
            return ""
        self.held += text
        places = [place for place in map(self.held.find, self.stops) if place >= 0]
        if places:
            self.found = True
            shown, self.held = self.held[: min(places)], ""
            return shown
        kept = max((overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return shown

    def finish(self) -> str:
        """What was held back."""
        shown, self.held = self.held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
