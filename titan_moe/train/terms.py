"""From the `[regularizers]` tables to the library's `Terms`."""

from titan_moe import extend
from titan_moe.config.tables import Config
from torchtitan_ext.terms import Terms, enabled_terms


def build_terms(config: Config) -> Terms:
    regularizers = config.regularizers
    enabled = enabled_terms(regularizers.weights(), regularizers.measure)
    return Terms(
        weights=enabled,
        top_k=config.model.moe.top_k,
        lb_scope=regularizers.lb.scope,
        cp_source=regularizers.cp.source,
        custom={name: extend.regularizers[name] for name in enabled if name in extend.regularizers},
    )
