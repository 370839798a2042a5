"""Megatron's MoE layer with sp, which needs the activations of each token's experts.

`linear_fc2`, the experts' down projection, receives the activations times their gate weights: p * z. sp is a function of
cosines between rows, so factors of rows change neither its value nor its gradient with respect to z, and its gradient with
respect to p is 0. A hook before `linear_fc2` reads these rows for the time of one forward pass.

Under expert parallelism the rows of a token are at several ranks. The dispatcher's own way back brings them to the rank of
the token: one more all-to-all of width F, and one in the backward pass.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from torchtitan_ext.adapters.megatron.configuration import term_options
from torchtitan_ext.adapters.megatron.objective import acts, attach, log_value, scaled, token_weights
from torchtitan_ext.adapters.megatron.router import chosen_experts
from torchtitan_ext.terms.specialization import specialization_loss


class SpecializedMoELayer(MoELayer):
    """A MoELayer that adds sp to the objective. Its forward results and its parameters are MoELayer's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sp: Any = term_options(self.config).get("sp")
        if self.sp is not None:
            _down_projections(self.experts)
        # Of the forward pass that runs, from `route` and `preprocess` to `routed_experts_compute`.
        self._padding_mask: Tensor | None = None
        self._routing_map: Tensor | None = None

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None, **further: Any) -> Any:
        self._padding_mask = padding_mask
        return super().route(hidden_states, padding_mask, **further)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Any:
        self._routing_map = routing_map
        return super().preprocess(hidden_states, probs, routing_map)

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> Any:
        routing_map, padding_mask = self._routing_map, self._padding_mask
        self._routing_map = self._padding_mask = None
        if self.sp is None or not acts(self):
            return super().routed_experts_compute(hidden_states, probs)
        assert routing_map is not None
        tokens, config, coefficient = routing_map.shape[0], self.config, self.sp.weight
        rows_TK = token_rows(routing_map, config.moe_router_topk)
        weights = token_weights(self.router, tokens, padding_mask, routing_map.device)

        def loss(z_RF: Tensor, dispatcher: Any) -> Tensor:
            home_RF = rows_home(z_RF, dispatcher)
            assert home_RF.shape[0] == rows_TK.numel(), "rows were dropped or padded"
            value = specialization_loss(
                home_RF, rows=rows_TK, weights=weights.weights_T, above_chance=self.sp.above_chance
            )
            log_value("sp", value, self.router)
            return coefficient * value

        down = _down_projections(self.experts)
        seen: list[Tensor] = []
        if getattr(self.experts, "activation_recompute", False):
            # `moe_act`: Megatron frees the rows after linear_fc2 and computes them again in its backward pass, so that sp
            # can read them only then. By that time the dispatcher may serve another micro-batch: a copy keeps its sizes.
            def hook(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                dispatcher = copy.copy(self.token_dispatcher)
                rows = _LossInBackward.apply(inputs[0], lambda z: scaled(loss(z, dispatcher), weights, config))
                return (rows, *inputs[1:])
        else:

            def hook(_: Any, inputs: tuple[Any, ...]) -> None:  # type: ignore[misc]
                seen.append(inputs[0])

        handles = [module.register_forward_pre_hook(hook) for module in down]
        try:
            output, *rest = super().routed_experts_compute(hidden_states, probs)
        finally:
            for handle in handles:
                handle.remove()
        if seen:
            z_RF = torch.cat(seen) if len(seen) > 1 else seen[0]
            output = attach(output, loss(z_RF, self.token_dispatcher), weights, config)
        return (output, *rest)


def _down_projections(experts: Any) -> list[torch.nn.Module]:
    """The modules that receive the rows: one per local expert, in their order, or one for all of them."""
    if hasattr(experts, "local_experts"):
        return [expert.linear_fc2 for expert in experts.local_experts]
    if hasattr(experts, "linear_fc2"):
        return [experts.linear_fc2]
    raise ValueError(f"sp: {type(experts).__name__} has no linear_fc2; use SequentialMLP or TEGroupedMLP")


def token_rows(routing_map: Tensor, top_k: int) -> Tensor:
    """Where the rows of each token are among rows sorted by expert, then token: (T, E) -> (T, k) int64."""
    tokens, experts = routing_map.shape
    order_TE = (routing_map.t().reshape(-1).cumsum(0) - 1).view(experts, tokens).t()
    return order_TE.gather(1, chosen_experts(routing_map, top_k))


def rows_home(z_RF: Tensor, dispatcher: Any) -> Tensor:
    """Rows of the local experts -> rows of this rank's tokens, sorted by expert, then token. Differentiable."""
    if dispatcher.ep_size == 1:
        return z_RF
    home: Tensor = dispatcher.token_combine(dispatcher.combine_preprocess(z_RF))
    return home


class _LossInBackward(torch.autograd.Function):
    """The identity on rows. Its backward computes a loss of the rows, which are read only then, and adds its gradient."""

    @staticmethod
    def forward(ctx: Any, z_RF: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(z_RF)
        ctx.loss = loss
        return z_RF.view_as(z_RF)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None]:
        (z_RF,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf_RF = z_RF.detach().requires_grad_()
            (own_RF,) = torch.autograd.grad(ctx.loss(leaf_RF), leaf_RF)
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        if scale is not None:
            own_RF = own_RF * scale
        return grad_RF + own_RF.to(grad_RF.dtype), None
