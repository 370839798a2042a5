"""Progress bars of lm-evaluation-harness, and of the packages that it uses, are left out."""

import contextlib
from collections.abc import Iterator
from typing import Any

from titan_moe.runtime.optional import optional


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside, tqdm draws nothing, except for downloads from the Hugging Face hub; stdout and stderr stay as they are.

    tqdm has no switch that works once it is imported, and the harness passes it no option. Raises UserError without tqdm."""
    bar = optional("tqdm", "eval", "--tasks").tqdm
    start = bar.__init__

    def without_display(self: Any, *arguments: Any, **options: Any) -> None:
        if not type(self).__module__.startswith("huggingface_hub"):
            options["disable"] = True
        start(self, *arguments, **options)

    bar.__init__ = without_display
    try:
        yield
    finally:
        bar.__init__ = start
