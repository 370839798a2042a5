"""More than a thousand texts of all kinds, for the comparison of tokenizers."""

import random

from tests.helpers.commands import ROOT

ALPHABETS = (" \n\tabcde(=_0", "    \t\n\r", "abcdeé中文字и—", "0123456789.,-+", "aaaab", "<s>/unk|x0A41 ")


def texts() -> list[str]:
    """Code, prose, whitespace, digits and characters of every plane; no text has U+2581 or the name of a control symbol."""
    drawn = random.Random(0)
    sources = [path.read_text() for path in sorted((ROOT / "titan_moe").rglob("[a-z]*.py"))]
    found = []
    for number in range(1010):
        kind = number % 10
        if kind < 3:
            source = drawn.choice(sources)
            start = drawn.randrange(len(source))
            found.append(source[start : start + drawn.randint(1, 400)])
        elif kind < 9:
            letters = ALPHABETS[kind - 3]
            found.append("".join(drawn.choice(letters) for _ in range(drawn.randint(1, 60))))
        else:
            codes = (drawn.choice((0x80, 0x3000, 0xD800, 0x10FFFF)) for _ in range(drawn.randint(1, 30)))
            letters = "".join(chr(drawn.randrange(1, code)) for code in codes)
            found.append(letters.encode("utf-8", "ignore").decode())  # without lone surrogates
    found[:4] = ["", " ", "\n", " leading and trailing  "]
    symbols = ("<s>", "</s>", "<unk>", "<pad>", "\u2581")
    return [text for text in found if not any(symbol in text for symbol in symbols)]
