"""From the `[regularizers]` tables to the library's `Terms`."""

from titan_moe.config.tables import Config
from torchtitan_ext.collectives import Ranks
from torchtitan_ext.terms import Setting, Terms, build_terms
from torchtitan_ext.terms.base import matched


def terms_of(config: Config, ranks: Ranks | None = None) -> Terms:
    """The terms that a run computes. ranks: process groups of the ranks that hold tokens of the same microbatch."""
    moe, options = config.model.moe, config.regularizers.options()
    measure = [*config.regularizers.measure, *(["lb"] if any(map(matched, options.values())) else [])]
    return build_terms(options, Setting(moe.top_k, moe.hidden_dim, config.job.seed, ranks), measure)
