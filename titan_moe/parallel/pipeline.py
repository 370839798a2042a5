"""Pipeline parallelism: consecutive blocks form stages on different ranks, and microbatches pass from stage to stage.

Schedules and communication are those of torch.distributed.pipelining. A stage sends its hidden states and the carry, so
every term, also cp between layers of two stages, is complete at the last stage. All ranks of a pipeline read the same
microbatches from the loader, so labels, positions and token weights are not sent.

With tied embeddings the first and the last stage each have a copy of `embedding`: one to embed tokens, one to project
onto the vocabulary. Both start from the same values, and `sum_tied_gradients` gives both the sum of their gradients, so
the optimizer keeps them equal. They have the same name, and a checkpoint saves one of them.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from titan_moe.config.degrees import layers_per_stage, micro_steps, stage_layers
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.model.gemm import local
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.runner import Evaluation, Runner, StepSums
from torchtitan_ext.carry import Carry
from torchtitan_ext.collectives import Group

SCHEDULES: dict[str, Any] = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
}


def drop_other_stages(model: Transformer, config: Config, group: Group) -> None:
    """Deletes the parameters of other ranks' stages, in place. First and last stage both keep a tied embedding."""
    kept = {str(layer) for layers in stages_of_rank(config, group).values() for layer in layers}
    for name in set(model.layers) - kept:
        del model.layers[name]
    if group.rank() > 0 and not (is_last(group) and model.settings.tie_embeddings):
        del model.embedding
    if not is_last(group):
        del model.norm, model.output


def stages_of_rank(config: Config, group: Group) -> dict[int, range]:
    """This rank's stages: stage number to block indices. Stage s is on rank s modulo ranks."""
    stages = enumerate(stage_layers(layers_per_stage(config)))
    return {number: layers for number, layers in stages if number % group.size() == group.rank()}


def is_last(group: Group) -> bool:
    """Whether this rank has the last stage."""
    return group.rank() == group.size() - 1


def tied_copies(model: Transformer, group: Group | None) -> list[nn.Parameter]:
    """The last stage's copy of a tied embedding, if it is on this rank; gradient norms count the first stage's copy."""
    return [model.embedding] if model.settings.tie_embeddings and group is not None and is_last(group) else []


@torch.no_grad()
def sum_tied_gradients(model: Transformer, group: Group | None) -> None:
    """Adds up the gradients of the two copies of a tied embedding, on the first and last stage; a no-op on others.

    Ranks exchange their own shards: the ranks of one pipeline have equal coordinates in all other mesh dimensions.
    The two sums are bitwise equal, because a + b is b + a.
    """
    if group is None or not model.settings.tie_embeddings or not (is_last(group) or group.rank() == 0):
        return
    gradient = model.embedding.grad
    assert gradient is not None
    sent = local(gradient).contiguous()
    received = torch.empty_like(sent)
    peer = group.size() - 1 - group.rank()
    pairs = ((dist.isend, sent), (dist.irecv, received))
    for work in dist.batch_isend_irecv([dist.P2POp(op, x, group=group, group_peer=peer) for op, x in pairs]):
        work.wait()
    local(gradient).add_(received)


def run_stage(
    model: Transformer, inputs: Inputs, received: tuple[Tensor, ...] | None, layers: range, last: bool
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Forward pass of one stage. received: what the previous stage sent, None for the first stage.

    Returns the tensors to send (hidden states and carry), or for the last stage the cross-entropy (1,) and the carry
    without `previous` and `term_sums`; and the chosen experts (T, k) of the stage's MoE layers.
    """
    if received is None:
        h_BSD = model.embed(inputs.tokens)
        carry = model.empty_carry(inputs.tokens.numel(), inputs.tokens.device)
        if torch.is_grad_enabled():  # the schedules expect this of every carry, even from a stage without MoE layers
            for x in (carry.terms, carry.previous, carry.term_sums):
                x.requires_grad_()
    else:
        h_BSD, carry = received[0], Carry(*received[1:])
    h_BSD, carry, routing = model.run_blocks(inputs, h_BSD, carry, layers)
    if last:
        terms = model.terms.complete(carry).terms.clone()
        return (torch.stack([model.loss(h_BSD, inputs)]), terms, carry.counts, carry.sums), routing
    carry = carry._replace(
        terms=carry.terms.clone(), previous=carry.previous.clone(), term_sums=carry.term_sums.clone()
    )
    return (h_BSD, *carry), routing


class _Stage(nn.Module):
    """One stage as the schedules call it: tensors in, tensors out, microbatches in order."""

    def __init__(self, run_stage: Callable[..., Any], layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.run_stage, self.layers, self.first, self.last = run_stage, layers, first, last
        self.queue: list[Inputs] = []

    def forward(self, *received: Tensor) -> tuple[Tensor, ...]:
        return self.run(self.queue.pop(0), received)[0]

    def run(self, inputs: Inputs, received: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        return self.run_stage(inputs, None if self.first else received, self.layers, self.last)


class PipelineRunner(Runner):
    """This rank's stages and the schedule that runs them. Raises UserError with torch 2.11."""

    def __init__(self, model: Transformer, config: Config, mesh: Mesh) -> None:
        super().__init__(model, config)
        assert mesh.pp is not None
        if torch.__version__.startswith("2.11."):
            raise UserError(
                f"parallelism.pp = {mesh.degrees.pp}: torch {torch.__version__} can't send whole numbers between stages; "
                "install torch 2.13 or newer, or set it to 1"
            )
        self.group, self.tp = mesh.pp, mesh.degrees.tp
        self.kind = SCHEDULES[config.parallelism.pp_schedule]
        self.micro_steps = micro_steps(config, mesh.degrees)
        self.stage_count = len(layers_per_stage(config))
        # `run_stage` becomes a method of the model, so that FSDP's hooks gather embedding, norm and output weight.
        module: Any = model
        module.run_stage = types.MethodType(run_stage, model)
        register_fsdp_forward_method(model, "run_stage")
        self.stages: dict[int, _Stage] = {}
        for n, layers in stages_of_rank(config, mesh.pp).items():
            self.stages[n] = _Stage(module.run_stage, layers, n == 0, n == self.stage_count - 1)
        self.schedule: Any = None

    def forward_backward(self, microbatches: Sequence[Inputs], factors: Mapping[str, float]) -> StepSums:
        if self.schedule is None:
            self.schedule = self.make_schedule(microbatches[0])
        self.sums, self.factors = self.zero_sums(microbatches[0].tokens.device), factors
        for stage in self.stages.values():
            stage.queue = list(microbatches)
        arguments = (torch.cat([inputs.tokens for inputs in microbatches]),) if 0 in self.stages else ()
        target = torch.zeros(len(microbatches)) if is_last(self.group) else None
        self.schedule.step(*arguments, target=target, losses=[], return_outputs=False)
        return self.sums

    def objective(self, output: tuple[Tensor, ...], target: Tensor) -> Tensor:  # noqa: ARG002 - the signature
        """The last stage's objective of one microbatch; adds its results to `self.sums`."""
        ce, terms, counts, sums = output
        objective = ce[0] + self.model.terms.objective(terms, self.factors)
        carry = self.sums.carry._replace(terms=terms, counts=counts, sums=sums)
        self.sums = self.sums.plus(objective, ce[0], carry)
        return objective

    def make_schedule(self, example: Inputs) -> Any:
        """The schedule, whose buffers have the shapes of this microbatch."""
        sent, final = self.example_outputs(example)
        count, device, stages = self.stage_count, example.tokens.device, []
        for number, stage in self.stages.items():
            shapes = ((example.tokens,) if stage.first else sent, final if stage.last else sent)
            stages.append(PipelineStage(stage, number, count, device, *shapes, group=self.group))
        own = stages if self.kind is ScheduleInterleaved1F1B else stages[0]
        return self.kind(own, self.micro_steps, loss_fn=self.objective, scale_grads=False)

    def example_outputs(self, inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Meta tensors like those that a stage sends, and like those that the last stage returns."""
        with torch.device("meta"):
            carry = self.model.empty_carry(inputs.tokens.numel(), torch.device("meta"))
            batch, seq = inputs.tokens.shape
            h = torch.empty(batch, seq // self.tp, self.model.settings.dim, dtype=self.model.dtype)
            ce = torch.empty(1, dtype=carry.terms.dtype)
        for x in (h, ce, carry.terms, carry.previous, carry.term_sums):
            x.requires_grad_()
        return (h, *carry), (ce, carry.terms, carry.counts, carry.sums)

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> Evaluation:
        """Receives from the previous stage, runs this rank's stages, sends to the next one."""
        ranks, settings, device = self.group.size(), self.model.settings, inputs.tokens.device
        carry = self.model.empty_carry(inputs.tokens.numel(), device)
        ce = carry.terms.new_zeros(())
        sent, _ = self.example_outputs(inputs)
        ids = torch.zeros(inputs.tokens.numel(), settings.moe.top_k, dtype=torch.int64, device=device)
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for number, stage in self.stages.items():
            received = tuple(torch.empty_like(x, device=device, requires_grad=False) for x in sent)
            if not stage.first:
                for x in (*received, ids):
                    dist.recv(x, group=self.group, group_src=(number - 1) % ranks)
            outputs, routing = stage.run(inputs, received)
            first_moe = max(stage.layers.start - settings.moe.first_dense_layers, 0)
            for layer, later in enumerate(routing, start=first_moe):
                if layer:
                    pairs[layer - 1] = (ids, later)
                ids = later
            if stage.last:
                ce = outputs[0][0]
                carry = carry._replace(terms=outputs[1], counts=outputs[2], sums=outputs[3])
                continue
            for x in (*outputs, ids):
                dist.send(x.contiguous(), group=self.group, group_dst=(number + 1) % ranks)
        return Evaluation(ce, carry, pairs)
