"""What a user's own module imports: the functions that register regularizers, corpora and trackers.

`extensions.modules` in the configuration names the module; docs/extending.md has an example of each kind.
"""

from titan_moe.config.extensions import Tracker, register_corpus, register_regularizer, register_tracker

__all__ = ["Tracker", "register_corpus", "register_regularizer", "register_tracker"]
