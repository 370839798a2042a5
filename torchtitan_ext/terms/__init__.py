"""The loss terms: one file each, a registry of them, and `Terms`, the enabled terms of a run.

`base.py` says what a term is. A model calls `Terms.probes`, `Terms.observe` and `Terms.add` in each MoE layer
(titan_moe/model/moe.py) and adds `Terms.objective` to the cross-entropy.
"""

import importlib
from pathlib import Path

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

for _file in sorted(
    Path(__file__).parent.glob("*.py")
):  # a term in a new file needs no line here; its table is behind those
    if _file.stem != "__init__":
        importlib.import_module(f"{__name__}.{_file.stem}")

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
