"""Whether a progress bar can be drawn on the terminal behind stderr. Does not import torch."""

import importlib.util
import sys


def shows_bars() -> bool:
    """True on a terminal, if rich, which draws the bars, is installed."""
    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
