"""The losses as plain functions on plain tensors. Each is defined in the file of its term, `torchtitan_ext/terms/`.

Shapes: T tokens, E experts, k chosen experts, F expert hidden width, D model width, L layers. Every function is a mean over
tokens for one layer (the caller sums over layers; only `coupling_loss` sees several) and returns a scalar in at least float32
(float64 for float64 input). With no token the result is a connected 0.

`weights` (T,) replaces the mean's 1/T: with 1/N for each of the N labelled tokens of the *global* batch and 0 for the
others, the results of microbatches and ranks add up to the value of the whole batch.
"""

from torchtitan_ext.terms.coupling import coupling_loss
from torchtitan_ext.terms.expert_router import expert_router_coupling_loss
from torchtitan_ext.terms.load_balance import load_balance_loss
from torchtitan_ext.terms.orthogonality import orthogonality_loss
from torchtitan_ext.terms.router_z import router_z_loss
from torchtitan_ext.terms.specialization import sketched_specialization_loss, specialization_loss
from torchtitan_ext.terms.variance import routing_variance_loss

__all__ = [
    "coupling_loss",
    "expert_router_coupling_loss",
    "load_balance_loss",
    "orthogonality_loss",
    "router_z_loss",
    "routing_variance_loss",
    "sketched_specialization_loss",
    "specialization_loss",
]
