"""A block in which this process may not read or write everything, even where root runs the tests."""

import contextlib
import os
from collections.abc import Iterator

NOBODY = 65534


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root acts as the user nobody; other users stay who they are."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
