"""What was read from a corpus, and what was left out of it and why."""

import functools
from collections.abc import Iterator

from titan_moe.config.extensions import Document

EXAMPLES = 3  # files and lines that the report shows for each reason


class Report:
    """Counts of one pass over a corpus. Files and rows are named as `FILE:LINE`, relative to what the user named."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts anew, for another pass over the same corpus."""
        self.files = self.rows = self.documents = self.bytes = self.replaced = self.nul = 0
        self.left_out: dict[str, int] = {}
        """How many files, rows or documents were left out, by reason."""
        self.examples: dict[str, list[str]] = {}
        """The first few of them, by reason."""
        self.notes: list[str] = []

    def leave_out(self, reason: str, place: str = "", count: int = 1) -> None:
        """Counts what is left out. reason: for example "row is not JSON". place: file and line."""
        self.left_out[reason] = self.left_out.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        if place and len(examples) < EXAMPLES:
            examples.append(printable(place))

    def note(self, words: str) -> None:
        """Adds a line, unless there are already many."""
        if len(self.notes) < EXAMPLES:
            self.notes.append(f"note: {words}")

    def clean(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents that have text, counted. Lone surrogates, which UTF-8 can't encode, become U+FFFD."""
        for document in documents:
            text = document.text
            if not isinstance(text, str) or not text:
                self.leave_out("document without text")
                continue
            try:
                size = len(text.encode("utf-8"))
            except UnicodeEncodeError:
                before = text.count("\ufffd")
                text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                self.replaced += text.count("\ufffd") - before
                size = len(text.encode("utf-8"))
            self.nul += text.count("\0")
            self.documents += 1
            self.bytes += size
            yield Document(text, printable(document.domain or ""))

    def first_problem(self) -> str:
        """The first thing that was left out, and why; empty if there is none."""
        for reason, count in self.left_out.items():
            place = f"{self.examples[reason][0]}: " if self.examples[reason] else ""
            return f"{place}{reason}{f' (and {count - 1:,} more)' if count > 1 else ''}"
        return ""

    def lines(self) -> list[str]:
        """The report in words, one line for each reason."""
        counts = [counted(n, noun) for n, noun in ((self.files, "file"), (self.rows, "row")) if n]
        lines = [", ".join([*counts, counted(self.documents, "document"), f"{self.bytes:,} bytes of text"])]
        for reason, count in self.left_out.items():
            examples = self.examples[reason]
            more = ", ..." if count > len(examples) > 0 else ""
            lines.append(f"left out: {reason}, {count:,} in all{': ' if examples else ''}{', '.join(examples)}{more}")
        if self.replaced:
            lines.append(f"replaced by U+FFFD: {counted(self.replaced, 'lone surrogate')}")
        if self.nul:
            lines.append(f"kept: {counted(self.nul, 'NUL character')} (a tokenizer is trained without them)")
        return lines + self.notes


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@functools.lru_cache
def printable(text: str) -> str:
    """The text with escapes for what no terminal shows, such as bytes of a file name that are not UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
