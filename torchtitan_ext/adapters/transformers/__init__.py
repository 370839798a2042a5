"""The losses in Mixture-of-Experts models of Hugging Face Transformers.

    from torchtitan_ext.adapters.transformers import attach

    attached = attach(model, {"sp": 2e-3, "cp": 1e-3})
    loss = model(**batch, labels=labels).loss      # with the terms
    attached.metrics()                             # {"reg/sp": ..., "reg/cp": ..., "moe/overlap": ..., ...}
    attached.detach()

structure.py finds routers and experts, experts.py observes activations and outputs through the library's own interface for
experts functions, tokens.py turns labels into token weights, attached.py hands it all to the terms of `torchtitan_ext.terms`.
inspection.py measures routing as `titan-moe inspect` does; run_directory.py writes what `titan-moe report` reads.
"""

from torchtitan_ext.adapters.transformers.attached import Attached, attach
from torchtitan_ext.adapters.transformers.run_directory import RunDirectory

__all__ = ["Attached", "RunDirectory", "attach"]
