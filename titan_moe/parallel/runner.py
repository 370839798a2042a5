"""Runs microbatches through the model. `PipelineRunner` (parallel/pipeline.py) does the same over pipeline stages."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_moe.config.tables import Config
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.fsdp import set_gradient_reduction
from torchtitan_ext.carry import Carry, add_carry


class StepSums(NamedTuple):
    """Sums over this rank's microbatches of a step, detached; zeros on a rank without the last pipeline stage."""

    objective: Tensor
    """(), cross-entropy plus weighted terms: what was differentiated."""
    ce: Tensor
    carry: Carry

    def plus(self, objective: Tensor, ce: Tensor, carry: Carry) -> "StepSums":
        """The sums with one more microbatch."""
        return StepSums(self.objective + objective.detach(), self.ce + ce.detach(), add_carry(self.carry, carry))


class Evaluation(NamedTuple):
    """One microbatch, forward only. `ce` and `carry` are zeros on a rank without the last pipeline stage."""

    ce: Tensor
    carry: Carry
    routing_pairs: dict[int, tuple[Tensor, Tensor]]
    """Chosen experts (T, k) of MoE layers l and l + 1, by l, for every l + 1 on this rank."""


class Runner:
    """Runs microbatches through all blocks; `PipelineRunner` overrides both methods."""

    def __init__(self, model: Transformer, config: Config) -> None:
        """model: after `parallelize`."""
        self.model, self.defer_reduction = model, config.parallelism.defer_reduction

    def forward_backward(self, microbatches: Sequence[Inputs], factors: Mapping[str, float]) -> StepSums:
        """Accumulates gradients over all microbatches of a step. factors: on each term's weight, by name; default 1."""
        sums = self.zero_sums(microbatches[0].tokens.device)
        for number, inputs in enumerate(microbatches, start=1):
            set_gradient_reduction(self.model, number == len(microbatches) or not self.defer_reduction)
            ce, carry = self.model(inputs)
            objective = ce + self.model.terms.objective(carry.terms, factors)
            objective.backward()
            sums = sums.plus(objective, ce, carry)
        return sums

    def zero_sums(self, device: torch.device) -> StepSums:
        carry = self.model.empty_carry(0, device)
        return StepSums(carry.terms.new_zeros(()), carry.terms.new_zeros(()), carry)

    def evaluate(self, inputs: Inputs) -> Evaluation:
        """Forward pass of one microbatch; call it under torch.no_grad()."""
        ce, carry, routing = self.model.evaluate(inputs)
        return Evaluation(ce, carry, dict(enumerate(itertools.pairwise(routing))))
