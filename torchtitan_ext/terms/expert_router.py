"""erc, expert-router coupling (Lv et al., "Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss").

Its cost does not depend on the number of tokens: it needs the gate projections of E vectors, one per expert, once a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torchtitan_ext.terms.base import (
    LayerView,
    Line,
    ModelFacts,
    Sizes,
    Term,
    TermOptions,
    Tokens,
    Weight,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


def expert_router_coupling_loss(
    router_weight: Tensor,
    gate_weight: Tensor,
    alpha: float = 1.0,
    noise: Tensor | None = None,
    detach_router: bool = False,
) -> Tensor:
    """erc: every expert should respond to its own routing vector more strongly than others do, and than it does to theirs.

    `M[i,j] = || W_gate^j (R_i * delta_i) ||`; the loss is
    `(1/E^2) sum_i sum_{j != i} max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0)`. router_weight: R (E, D). gate_weight:
    (E, F, D). noise: delta (E, D); drawn from torch's global generator when not given (no gradient passes through its bound).
    detach_router: no gradient into R. Squares must fit the dtype: in float32 every norm above, a row of R and M_ij, may be
    0 or from 1e-19 to 1e19. Raises ValueError for one expert or a negative alpha. Source: Lv et al.
    """
    import torch

    from torchtitan_ext.ops.response import coupling_excess, coupling_matrix, coupling_noise
    from torchtitan_ext.ops.routing import accumulate

    experts = router_weight.shape[0]
    if experts < 2:
        raise ValueError("expert_router_coupling_loss: needs at least two experts")
    if alpha < 0:
        raise ValueError(f"expert_router_coupling_loss: alpha={alpha} is negative")
    router_weight = accumulate(router_weight)
    if noise is None:
        noise = coupling_noise(router_weight, torch.rand_like(router_weight))
    if detach_router:
        router_weight = router_weight.detach()
    probes = router_weight * noise.to(router_weight.dtype)
    return coupling_excess(coupling_matrix(probes, gate_weight), alpha)


class ExpertRouterCouplingOptions(TermOptions):
    """erc, expert-router coupling (Lv et al.)."""

    alpha: Weight = 1.0
    """Factor on an expert's response to its own routing vector; responses of others up to that are not penalised."""
    detach_router: bool = False
    """Stop the gradient into the router."""


@register
class ExpertRouterCoupling(Term):
    name = "erc"
    title = "expert-router coupling"
    Options = ExpertRouterCouplingOptions

    @classmethod
    def problems(cls, options: Any, model: ModelFacts) -> Iterable[tuple[str, str]]:  # noqa: ARG003 - the interface
        if model.experts == 1:
            yield "weight", "erc compares experts, and model.moe.experts = 1"

    def probes(self, router_weight_ED: Tensor, layer: int, tokens: Tokens) -> Tensor | None:
        """The noisy routing vectors `R_i * delta_i`; None in all microbatches of a step but one."""
        import torch

        from torchtitan_ext.ops import draws
        from torchtitan_ext.ops.response import coupling_noise
        from torchtitan_ext.ops.routing import accumulate

        if tokens.fraction == 0.0:
            return None
        if self.options.detach_router or not self.weighted:
            router_weight_ED = router_weight_ED.detach()
        router_weight_ED = accumulate(router_weight_ED)
        device, dtype = router_weight_ED.device, router_weight_ED.dtype
        experts, dim = (torch.arange(size, device=device) for size in router_weight_ED.shape)
        key = (draws.ERC_NOISE, self.setting.seed, layer, tokens.step)
        uniform = draws.keyed_uniform(*key, rows_B=experts, columns_S=dim, device=device, dtype=dtype)
        return router_weight_ED * coupling_noise(router_weight_ED.detach(), uniform)

    def value(self, view: LayerView) -> Tensor:
        from torchtitan_ext.ops.response import coupling_excess

        if view.responses_PE is None:
            return view.weights_T.new_zeros(())
        return coupling_excess(view.responses_PE, self.options.alpha) * view.tokens.fraction

    def traffic(self, sizes: Sizes) -> Iterable[Line]:
        s, weighted = sizes, self.weighted
        own = s.experts // s.ep
        if s.ep > 1:  # once a step: this rank's columns of (E, E), and the gradient of all of them
            columns = s.moe_layers * s.forwards * s.experts * own
            yield Line("all-gather", "erc: responses", columns * s.exact)
            gradient = s.moe_layers * s.experts**2 if weighted else 0
            yield Line("reduce-scatter", "erc: gradient of responses", gradient * s.exact)
        if s.tp > 1:  # sums over hidden units, and the gradient of the probes
            gradient = s.experts * s.dim if weighted else 0
            numbers = s.moe_layers * (s.forwards * own * s.experts + gradient)
            yield Line("all-reduce", "erc: sums over hidden units", numbers * s.exact)
