"""What a user's own module imports to register loss terms, optimizers, corpora and trackers.

`extensions.modules` in the configuration names the module; docs/extending.md has an example of each kind.
"""

from titan_moe.config.extensions import Document, Tracker, register_corpus, register_optimizer, register_tracker
from torchtitan_ext.terms import (
    ExpertRows,
    LayerView,
    MatchedOptions,
    ModelFacts,
    Needs,
    Term,
    TermOptions,
    Tokens,
    Weight,
    register,
)

__all__ = [
    "Document",
    "ExpertRows",
    "LayerView",
    "MatchedOptions",
    "ModelFacts",
    "Needs",
    "Term",
    "TermOptions",
    "Tokens",
    "Tracker",
    "Weight",
    "register",
    "register_corpus",
    "register_optimizer",
    "register_tracker",
]
