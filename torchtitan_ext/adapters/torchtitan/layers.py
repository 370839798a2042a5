"""MoE layers that record what the terms need: subclasses of TorchTitan's, with the same parameters and operations.

A layer's activations z and outputs y do not leave it: their inner products per token do, which are small, so that activation
checkpointing still frees the activations. A recomputation runs the same operations as the forward pass (PyTorch compares
them), and only does not record.

T tokens of this rank, K chosen experts, N = T * K, R rows at this rank's experts, X any width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchtitan.config.override import derive
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from torchtitan_ext.adapters.torchtitan.record import NAME, RECORD, Seen
from torchtitan_ext.adapters.torchtitan.training import subclass
from torchtitan_ext.ops.gram import token_gram


def recorded_layer(config: MoE.Config) -> MoE.Config:
    """The configuration of an MoE layer with its parts replaced. Raises ValueError for parts that compute otherwise."""
    routed = config.routed_experts
    experts, dispatcher = routed.inner_experts, routed.token_dispatcher
    for part, kind in (
        (config, MoE),
        (routed, RoutedExperts),
        (experts, GroupedExperts),
        (config.router, TokenChoiceTopKRouter),
    ):
        owner = type(part)._owner
        if getattr(owner, "forward", None) is not kind.forward:
            raise ValueError(
                f"{NAME}: {owner.__name__} has a forward of its own, in which the terms' tensors are not found"
            )
    if type(dispatcher) not in (LocalTokenDispatcher.Config, AllToAllTokenDispatcher.Config):
        raise ValueError(
            f"{NAME}: {type(dispatcher)._owner.__name__} sends tokens to experts in an order that is not known; use "
            "moe_comm_backend='standard'"
        )
    parts = derive(
        routed,
        type(routed),
        inner_experts=derive(experts, subclass(RecordedExperts, type(experts))),
        token_dispatcher=derive(dispatcher, subclass(RecordedDispatcher, type(dispatcher))),
    )
    return derive(config, subclass(RecordedMoE, type(config)), routed_experts=parts)


class RecordedMoE:
    """Records the router's logits, the choice, and inner products of activations and outputs."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg] # a mixin of MoE
        layer: Any = self
        # What the parts saw in the current forward pass; emptied at its end.
        self.kept: dict[str, Any] = {}
        layer.routed_experts.inner_experts.kept = layer.routed_experts.token_dispatcher.kept = self.kept
        self.seen: Seen | None = None
        RECORD.layers.append(self)
        layer.router.register_forward_hook(self._keep_choice)
        layer.router.gate.register_forward_hook(self._keep_logits)

    def _keep_choice(self, _: Any, __: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        self.kept["gates"], self.kept["ids"] = outputs[:2]

    def _keep_logits(self, _: Any, __: Any, logits_BLE: Tensor) -> None:
        self.kept["logits"] = logits_BLE

    def forward(self, x_BLD: Tensor) -> Tensor:
        out_BLD: Tensor = super().forward(x_BLD)  # type: ignore[misc]
        kept = dict(self.kept)
        self.kept.clear()
        layer: Any = self
        if layer.training and torch.is_grad_enabled():
            seen = self._seen(kept)
            if not recomputing():
                if self.seen is not None:
                    raise ValueError(f"{NAME}: two forward passes in training mode before one call of the loss")
                self.seen = seen
        return out_BLD

    def _seen(self, kept: dict[str, Any]) -> Seen:
        layer: Any = self
        ids_TK = kept["ids"].flatten(0, 1)
        order_N = torch.argsort(ids_TK.flatten(), stable=True)  # as the dispatcher orders rows
        rows_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        rows_TK, home = rows_N.view_as(ids_TK), layer.routed_experts.token_dispatcher.home

        def gram(term: str, rows_RX: Tensor, scaled: bool) -> Tensor | None:
            weighted = RECORD.weighted(term)
            if weighted is None:
                return None
            return token_gram(home(rows_RX if weighted else rows_RX.detach(), kept["metadata"]), rows_TK, scaled)

        return Seen(
            kept["logits"].flatten(0, 1).float(),
            layer.router.score_func,
            ids_TK,
            kept["gates"].flatten(0, 1),
            kept["z"].shape[1],
            gram("sp", kept["z"], scaled=True),  # cosines do not depend on the rows' lengths
            gram("o", kept["y"], scaled=False),
        )


def recomputing() -> bool:
    """Whether this is a recomputation by activation checkpointing: those run in the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RecordedExperts:
    """Keeps the activations z."""

    kept: dict[str, Any]

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        # Called for gate, up and down projection. The input of the last is z.
        self.kept["z"] = A
        out: Tensor = super()._grouped_mm(A=A, B_t=B_t, offs=offs)  # type: ignore[misc]
        return out


class RecordedDispatcher:
    """Keeps the experts' outputs y, and brings rows to the ranks of their tokens."""

    kept: dict[str, Any]

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        self.kept["y"], self.kept["metadata"] = routed_output_RD, metadata
        out_TD: Tensor = super().combine(routed_output_RD, metadata, x_TD)  # type: ignore[misc]
        return out_TD

    def home(self, rows_RX: Tensor, metadata: Any) -> Tensor:
        """Rows at the experts to the ranks of their tokens, (R, X) -> (N, X), sorted by expert. Differentiable.

        It is `combine`, told that each row belongs to a token of its own and has weight 1, so that nothing is summed."""
        if getattr(self, "ep_mesh", None) is None:
            return rows_RX
        tokens_N = metadata.token_indices_experts_sorted_N
        own = replace(
            metadata,
            token_indices_experts_sorted_N=torch.arange(len(tokens_N), device=tokens_N.device),
            topk_scores_experts_sorted_N=torch.ones(len(tokens_N), device=tokens_N.device),
            input_shape=rows_RX.shape,
        )
        home_NX: Tensor = super().combine(rows_RX, own, rows_RX.new_empty(len(tokens_N), rows_RX.shape[1]))  # type: ignore[misc]
        return home_NX
