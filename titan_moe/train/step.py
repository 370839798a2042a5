"""One optimizer step: batch, forward, loss, backward, clip, step, balance."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_moe.config.tables import Balancer, Config
from titan_moe.data.loader import Batch
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.context import context_shard
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.norm import clip_gradients
from titan_moe.parallel.parallelize import sum_replicated_gradients
from titan_moe.parallel.pipeline import tied_copies
from titan_moe.parallel.runner import Runner, StepSums
from titan_moe.runtime.stopping import STOPPING, Stopping
from titan_moe.train.inputs import to_inputs
from titan_moe.train.step_log import StepLog, pack
from torchtitan_ext.balancer import update_expert_bias
from torchtitan_ext.carry import Carry, add_carry
from torchtitan_ext.collectives import all_sum
from torchtitan_ext.dtypes import accumulation_dtype


class StepResult(NamedTuple):
    """Tensors on the device, of the global batch; reading one makes the host wait for the step."""

    loss: Tensor
    """J: cross-entropy plus weighted terms."""
    ce: Tensor
    carry: Carry
    grad_norm: Tensor
    """Before clipping."""
    skipped: bool
    """True only for a gradient spike. A number that is not finite raises instead, here or later in `log.read`."""


def train_step(
    runner: Runner,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    config: Config,
    mesh: Mesh,
    step: int,
    factors: Mapping[str, float],
    log: StepLog | None = None,
) -> StepResult:
    """One optimizer step on this rank's microbatches of a global batch.

    step: 1 is the first. factors: by term name, what its weight is multiplied by at this step. log: receives the step's
    numbers and decides whether to update.
    A number that is not finite prevents the update on all ranks; NonFiniteError names it, from here or from `log.read`.
    """
    model = runner.model
    log = log or StepLog(model, optimizer, Stopping(mesh.everyone, mesh.device))
    inputs = step_inputs(model, batches, mesh, step)
    sums = runner.forward_backward(inputs, factors)  # forward, loss and backward of every microbatch
    numbers, carry = sum_over_ranks(sums, log.stopping.votes(), mesh)
    sum_replicated_gradients(model, mesh)
    copies = tied_copies(model, mesh.pp)
    norm, norms = clip_gradients(list(model.parameters()), config.training.max_grad_norm, mesh.pp, copies, optimizer)
    # Deferred reads (a GPU) always admit: there `found_inf`, set on the optimizer, blocks the update on the device.
    update = log.allow(step, pack(numbers, norm, norms, carry.counts))
    if update:
        optimizer.step()
        balance_experts(model, carry.counts, config.balancer, log.found_inf)
    optimizer.zero_grad()
    first = len(STOPPING)
    return StepResult(numbers[first], numbers[first + 1], carry, norm, skipped=not update)


def step_inputs(model: Transformer, batches: Sequence[Batch], mesh: Mesh, step: int) -> list[Inputs]:
    """This rank's microbatches of a step as inputs of the model.

    Terms that do not depend on tokens are computed in the first microbatch; each rank contributes an equal part.
    """
    dtype, degrees = accumulation_dtype(model.dtype), mesh.degrees
    inputs = []
    for number, part in enumerate(batches):
        fraction = 1.0 / degrees.token_ranks if number == 0 else 0.0
        inputs.append(context_shard(to_inputs(part, dtype, mesh.device, step, fraction), degrees.cp, mesh.cp_rank))
    return inputs


def sum_over_ranks(sums: StepSums, votes: Tensor, mesh: Mesh) -> tuple[Tensor, Carry]:
    """Sums over all ranks: one vector of stop votes (signals that ranks received, runtime/stopping.py), loss, cross-entropy,
    terms and measures; and the carry.

    One all-reduce of floats, one of counts. Tensor-parallel ranks hold the same tokens, so only their votes are summed.
    """
    if mesh.tp is not None:
        votes = all_sum(votes, mesh.tp.get_group())
    loss, ce, carry = sums
    parts = (votes, loss.reshape(1), ce.reshape(1), carry.terms, carry.sums.flatten())
    numbers = sum_over_tokens(torch.cat(parts), mesh)
    *_, terms, measures = numbers.split([part.numel() for part in parts])
    counts = sum_over_tokens(carry.counts, mesh)
    return numbers, carry._replace(terms=terms, counts=counts, sums=measures.view_as(carry.sums))


def sum_over_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum over the ranks with different tokens, and over pipeline ranks, where all but the last one have zeros."""
    return all_sum(all_sum(x, mesh.ranks.data), mesh.pp)


def balance_experts(model: Transformer, counts: Tensor, settings: Balancer, found_inf: Tensor) -> None:
    """Moves each router's bias against this step's load of its experts, unless `found_inf` is set. counts: (L, E)."""
    if settings.rate > 0:
        for moe in model.moe_modules():
            bias = moe.router.expert_bias
            moved = bias.clone()
            update_expert_bias(moved, counts[moe.layer], settings.rate, settings.center)
            bias.copy_(torch.where(found_inf > 0, bias, moved))


@torch.no_grad()
def measure(runner: Runner, batches: Sequence[Batch], mesh: Mesh, step: int) -> dict[str, float]:
    """ "ce" and the unweighted terms, by name, of a global batch, without an update."""
    carry: Carry | None = None
    ce: Tensor | float = 0.0
    for inputs in step_inputs(runner.model, batches, mesh, step):
        evaluation = runner.evaluate(inputs)
        carry, ce = add_carry(carry, evaluation.carry), ce + evaluation.ce
    assert carry is not None
    numbers = torch.cat([torch.as_tensor(ce).reshape(1), carry.terms])
    return dict(zip(("ce", *runner.model.terms.names), sum_over_tokens(numbers, mesh).tolist(), strict=True))
