"""From the `[regularizers]` tables to the library's `Terms`, and what multiplies their weights at a step."""

import math
from collections.abc import Mapping

from titan_moe.config import extensions
from titan_moe.config.tables import Config
from torchtitan_ext.collectives import Ranks
from torchtitan_ext.losses import chance_overlap
from torchtitan_ext.terms import Terms, enabled_terms


def build_terms(config: Config, ranks: Ranks | None = None) -> Terms:
    regularizers = config.regularizers
    measure = [*regularizers.measure, *(["lb"] if regularizers.matched() else [])]
    enabled = enabled_terms(regularizers.weights(), measure)
    return Terms(
        weights=enabled,
        top_k=config.model.moe.top_k,
        seed=config.job.seed,
        lb_scope=regularizers.lb.scope,
        sp_method=regularizers.sp.method,
        sp_sketch_dim=regularizers.sp.sketch_dim,
        sp_sample_fraction=regularizers.sp.sample_fraction,
        sp_floor=chance_overlap(config.model.moe.hidden_dim) if regularizers.sp.above_chance else 0.0,
        cp_source=regularizers.cp.source,
        cp_form=regularizers.cp.form,
        o_variant=regularizers.o.variant,
        v_variant=regularizers.v.variant,
        v_scope=regularizers.v.scope,
        erc_alpha=regularizers.erc.alpha,
        erc_detach_router=regularizers.erc.detach_router,
        ranks=ranks or Ranks(),
        custom={name: extensions.regularizers[name] for name in enabled if name in extensions.regularizers},
    )


def weight_factors(config: Config, step: int, scales: Mapping[str, float]) -> dict[str, float]:
    """What every term's weight is multiplied by at a step: its warm-up, and its scaling to lb."""
    warmups = config.regularizers.warmups()
    rising = {name: min(1.0, step / steps) for name, steps in warmups.items() if steps > 0}
    return {name: rising.get(name, 1.0) * scales.get(name, 1.0) for name in warmups}


def lb_scales(config: Config, values: Mapping[str, float]) -> dict[str, float]:
    """`10^round(log10(R_lb / |R|))` of every term with `match_lb`; 1 for a term that is 0. values: terms of the first step."""
    return {
        name: 10.0 ** round(math.log10(values["lb"] / abs(values[name]))) if values[name] else 1.0
        for name in config.regularizers.matched()
    }
