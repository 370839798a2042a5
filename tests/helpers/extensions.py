"""Takes back what a test registered, for the tests after it."""

from titan_moe.config.extensions import optimizers


def forget_optimizers() -> None:
    """Removes all optimizers but the built-in ones."""
    for name in optimizers.keys() - {"adamw", "muon"}:
        del optimizers[name]
