"""Writes generated text to stdout, and reads prompts in an interactive session."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence

from titan_moe.generate.loop import Piece

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but tab and newline


def shown(text: str) -> str:
    """The text as it is written: to a terminal without control characters, which could change its settings."""
    if not sys.stdout.isatty():
        return text
    return CONTROL.sub(lambda sign: f"\\x{ord(sign.group()):02x}", text)


def write_pieces(pieces: Iterator[Piece], prompts: Sequence[str]) -> None:
    """Writes each text and a newline, in the order of the prompts; the first that has not ended is written as it comes.

    With several prompts each text's prompt goes to stderr before it. When it is interrupted, the line is ended too."""
    waiting, ended, current, started = [""] * len(prompts), [False] * len(prompts), 0, False

    def write(text: str) -> None:
        sys.stdout.write(shown(text))
        sys.stdout.flush()

    def announce() -> None:
        if len(prompts) > 1:
            print(f"--- {current + 1}: {prompts[current][:100]!r}", file=sys.stderr, flush=True)

    announce()
    try:
        for piece in pieces:
            waiting[piece.text_number] += piece.text
            ended[piece.text_number] |= bool(piece.ended)
            while current < len(prompts):
                started = started or bool(waiting[current])
                write(waiting[current])
                waiting[current] = ""
                if not ended[current]:
                    break
                write("\n")
                current, started = current + 1, False
                if current < len(prompts):
                    announce()
    except KeyboardInterrupt:
        if started:
            write("\n")
        raise


def converse(answer: Callable[[str], None]) -> None:
    """Answers one prompt per line until the end of stdin. Ctrl-C ends a text, and the session where none is being made."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise
        if not line:
            return
        try:
            answer(line.removesuffix("\n"))
        except KeyboardInterrupt:
            print("interrupted; Ctrl-C again or Ctrl-D ends the session", file=sys.stderr)
