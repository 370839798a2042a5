"""The loss terms: one file each, a registry of them, and `Terms`, the enabled terms of a run.

`base.py` says what a term is. A model calls `Terms.probes`, `Terms.activate` and `Terms.add` in each MoE layer
(titan_moe/model/moe.py) and adds `Terms.objective` to the cross-entropy.
"""

from importlib import import_module
from pkgutil import iter_modules

# Each import registers a built-in term, in the order of their tables.
from torchtitan_ext.terms import (  # isort: skip # noqa: F401
    load_balance,
    router_z,
    specialization,
    coupling,
    orthogonality,
    variance,
    expert_router,
)
from torchtitan_ext.terms.base import (
    REGISTRY,
    ExpertRows,
    LayerView,
    Line,
    MatchedOptions,
    ModelFacts,
    Needs,
    Setting,
    Sizes,
    Term,
    TermOptions,
    Tokens,
    Weight,
    register,
)
from torchtitan_ext.terms.enabled import Terms, build_terms

# As in titan_moe/optim: a term in a further file of this folder needs no line here. Its table comes after those above.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "REGISTRY",
    "ExpertRows",
    "LayerView",
    "Line",
    "MatchedOptions",
    "ModelFacts",
    "Needs",
    "Setting",
    "Sizes",
    "Term",
    "TermOptions",
    "Terms",
    "Tokens",
    "Weight",
    "build_terms",
    "register",
]
