"""torchtitan_ext: the losses, balancer and measures that make experts specialise, as a library of their own.

Plain functions on plain tensors; nothing here knows the trainer. `losses` has the definitions, `terms` and `carry` the
way they travel through a model whose blocks may be recomputed, compiled, or spread over pipeline stages.
"""
