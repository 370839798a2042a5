"""Python's garbage collector, run at the same steps on all ranks: each would otherwise stop at a time of its own, and the
others would wait for it. As in TorchTitan."""

import contextlib
import gc
from collections.abc import Callable, Iterator

GENERATION = 1  # young objects, which takes milliseconds


@contextlib.contextmanager
def collected_every(steps: int) -> Iterator[Callable[[int], None]]:
    """Switches automatic collection off. Yields the function to call after every step with its number."""
    was_on = gc.isenabled()
    gc.disable()
    gc.collect(GENERATION)

    def after(step: int) -> None:
        if step % steps == 0:
            gc.collect(GENERATION)

    try:
        yield after
    finally:
        if was_on:
            gc.enable()
