"""Pipeline parallelism: blocks are cut into stages, and micro-batches follow one another through them.

The carry travels with the hidden states like any other activation, so every term, cp across a border included, comes out at the
last stage. Schedules and their communication are PyTorch's. Every rank of a pipeline reads the same micro-batches from the
loader, so labels, positions and weights are never sent.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from titan_moe.config.degrees import stage_layers
from titan_moe.model.transformer import Inputs, Transformer
from torchtitan_ext.carry import Carry
from torchtitan_ext.collectives import Group

SCHEDULES: dict[str, Any] = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
}


class Result(NamedTuple):
    """A micro-batch's, at the last stage."""

    ce: Tensor
    carry: Carry


class _Stage(nn.Module):
    """Some blocks of the model as the schedules want them: tensors in, tensors out; micro-batches come in order."""

    def __init__(self, model: Transformer, layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.owner = (model,)  # in a tuple, so that its parameters are not this module's too
        self.layers, self.first, self.last = layers, first, last
        self.waiting: list[Inputs] = []

    def forward(self, *received: Tensor) -> tuple[Tensor, ...]:
        return self.owner[0].run_stage(self.waiting.pop(0), None if self.first else received, self.layers, self.last)


class Pipeline:
    """This rank's stages and the schedule that drives them."""

    def __init__(
        self, model: Transformer, layers: list[int], schedule: str, group: Group, micro_steps: int, tp: int
    ) -> None:
        """layers: number of them in each stage, over all ranks; stage s is on rank s modulo ranks. tp: ranks that share the
        tokens of what is handed on."""
        self.tp = tp
        self.model, self.group = model, group
        self.schedule_name, self.micro_steps = schedule, micro_steps
        self.parts = stage_layers(layers)
        self.stages = {
            number: _Stage(model, part, number == 0, number == len(layers) - 1)
            for number, part in enumerate(self.parts)
            if number % group.size() == group.rank()
        }
        self.has_last = len(layers) - 1 in self.stages
        self.schedule: Any = None
        self.results: list[Result] = []
        self.factors: Mapping[str, float] = {}

    def keep_own(self) -> None:
        """Drops the parts of the model that other ranks hold."""
        own = {str(layer) for number in self.stages for layer in self.parts[number]}
        for name in list(self.model.layers):
            if name not in own:
                del self.model.layers[name]
        if 0 not in self.stages:
            self.model.drop_embedding()
        if not self.has_last:
            self.model.drop_head()

    def step(self, parts: list[Inputs], factors: Mapping[str, float]) -> list[Result]:
        """Forward and backward of all micro-batches of a step; their results, on the rank of the last stage."""
        if self.schedule is None:
            self.schedule = self.make_schedule(parts[0])
        self.results, self.factors = [], factors
        for stage in self.stages.values():
            stage.waiting = list(parts)
        arguments = (torch.cat([part.tokens for part in parts]),) if 0 in self.stages else ()
        target = torch.zeros(len(parts)) if self.has_last else None
        self.schedule.step(*arguments, target=target, losses=[], return_outputs=False)
        return self.results

    def make_schedule(self, example: Inputs) -> Any:
        flow, end = self.examples(example)
        stages = []
        for number, module in self.stages.items():
            inputs = (example.tokens,) if module.first else flow
            outputs = end if module.last else flow
            stages.append(
                PipelineStage(
                    module,
                    number,
                    len(self.parts),
                    example.tokens.device,
                    input_args=inputs,
                    output_args=outputs,
                    group=self.group,
                )
            )
        kind = SCHEDULES[self.schedule_name]
        several = kind is ScheduleInterleaved1F1B
        return kind(stages if several else stages[0], self.micro_steps, loss_fn=self.objective, scale_grads=False)

    def examples(self, inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Tensors of the shapes, types and gradients of what stages hand on, and of what the last one returns."""
        with torch.device("meta"):
            carry = self.model.empty_carry(inputs.tokens.numel(), torch.device("meta"))
            batch, seq = inputs.tokens.shape
            h = torch.empty(batch, seq // self.tp, self.model.settings.dim, dtype=self.model.dtype)
            ce = torch.empty(1, dtype=carry.terms.dtype)
        for x in (h, ce, carry.terms, carry.previous):
            x.requires_grad_()
        return (h, *carry), (ce, carry.terms, carry.counts, carry.sums)

    def objective(self, output: tuple[Tensor, ...], target: Tensor) -> Tensor:  # noqa: ARG002 - the schedules' signature
        """The weighted sum that is differentiated; the last stage's results are put by."""
        ce, terms, counts, sums = output
        self.results.append(Result(ce.detach()[0], Carry(terms.detach(), terms.new_zeros(0), counts, sums)))
        return ce[0] + self.model.terms.objective(terms, self.factors)

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> tuple[Tensor, Carry, dict[int, tuple[Tensor, Tensor]]]:
        """One micro-batch, forward only: cross-entropy and carry (0 where the last stage isn't), and the chosen experts of each
        pair of neighbouring MoE layers of which the later one is here."""
        ranks, settings = self.group.size(), self.model.settings
        carry = self.model.empty_carry(inputs.tokens.numel(), inputs.tokens.device)
        ce = carry.terms.new_zeros(())
        ids = torch.zeros(inputs.tokens.numel(), settings.moe.top_k, dtype=torch.int64, device=inputs.tokens.device)
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        result = carry
        for number, part in enumerate(self.parts):
            if number not in self.stages:
                continue
            flow, _ = self.examples(inputs)
            received = tuple(torch.empty_like(x, device=inputs.tokens.device, requires_grad=False) for x in flow)
            if number:
                before = dist.get_global_rank(self.group, (number - 1) % ranks)
                for x in (*received, ids):
                    dist.recv(x, before, group=self.group)
            routing: list[Tensor] = []
            sent = self.model.run_stage(inputs, received if number else None, part, self.stages[number].last, routing)
            first = max(part.start - settings.moe.first_dense_layers, 0)
            for layer, later in enumerate(routing, start=first):
                if layer:
                    pairs[layer - 1] = (ids, later)
                ids = later
            if self.stages[number].last:
                ce = sent[0][0]
                result = Carry(sent[1], carry.previous, sent[2], sent[3])
                continue
            after = dist.get_global_rank(self.group, (number + 1) % ranks)
            for x in (*sent, ids):
                dist.send(x.contiguous(), after, group=self.group)
        return ce, result, pairs
