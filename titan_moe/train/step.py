"""One optimizer step: batch, forward, loss, backward, clip, step, balance."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from titan_moe.config.degrees import micro_batch_size
from titan_moe.config.tables import Balancer, Config
from titan_moe.data.loader import Batch
from titan_moe.errors import TrainingError
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.context import context_shard
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.norm import clip_gradients
from titan_moe.parallel.parallelize import sum_replicated_gradients
from titan_moe.parallel.pipeline import tied_copies
from titan_moe.parallel.runner import Runner, StepSums
from titan_moe.train.inputs import to_inputs
from titan_moe.train.metrics import first_non_finite, non_finite_gradient, routing_row
from titan_moe.train.watch import Spikes
from torchtitan_ext.balancer import update_expert_bias
from torchtitan_ext.carry import Carry, add_carry
from torchtitan_ext.collectives import all_sum
from torchtitan_ext.dtypes import accumulation_dtype


class StepResult(NamedTuple):
    loss: float
    """J: cross-entropy plus weighted terms."""
    ce: float
    carry: Carry
    routing: dict[str, float]
    """The `reg/*` and `moe/*` fields of the step's row."""
    grad_norm: float
    """Before clipping."""
    skipped: bool = False
    """Whether the parameters were left unchanged because of a gradient spike."""


def train_step(
    runner: Runner,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: Config,
    mesh: Mesh,
    step: int,
    factors: Mapping[str, float],
    spikes: Spikes | None = None,
) -> StepResult:
    """One optimizer step on a global batch.

    factors: on the terms' weights at this step, by name. spikes: decides whether to skip the update.
    Raises TrainingError, before the update and on all ranks, for a value that is not finite.
    """
    model = runner.model
    inputs = step_inputs(model, batch, config, mesh, step)
    sums = runner.forward_backward(inputs, factors)  # forward, loss and backward of every microbatch
    loss, ce, carry = sum_over_ranks(sums, mesh)
    sum_replicated_gradients(model, mesh)
    norm = clip_gradients(list(model.parameters()), config.training.max_grad_norm, mesh.pp, tied_copies(model, mesh.pp))
    result = StepResult(loss.item(), ce.item(), carry, routing_row(carry, model.terms), norm.item())
    check_finite(model, result)
    if spikes is not None and spikes.over(result.grad_norm):
        optimizer.zero_grad()
        return result._replace(skipped=True)
    optimizer.step()
    optimizer.zero_grad()
    balance_experts(model, carry.counts, config.balancer)
    return result


def step_inputs(model: Transformer, batch: Batch, config: Config, mesh: Mesh, step: int) -> list[Inputs]:
    """This rank's microbatches of a step as inputs of the model.

    Terms that do not depend on tokens are computed in the first microbatch; each rank contributes an equal part.
    """
    dtype, degrees = accumulation_dtype(model.dtype), mesh.degrees
    inputs = []
    for number, part in enumerate(batch.split(micro_batch_size(config, degrees), mesh.data_rank, degrees.data)):
        share = 1.0 / degrees.token_ranks if number == 0 else 0.0
        inputs.append(context_shard(to_inputs(part, dtype, mesh.device, step, share), degrees.cp, mesh.cp_rank))
    return inputs


def sum_over_ranks(sums: StepSums, mesh: Mesh) -> tuple[Tensor, Tensor, Carry]:
    """Loss, cross-entropy and carry summed over all ranks: one all-reduce of floats, one of counts."""
    loss, ce, carry = sums
    numbers = sum_over_tokens(torch.cat([loss.reshape(1), ce.reshape(1), carry.terms, carry.sums.flatten()]), mesh)
    terms = numbers[2 : 2 + carry.terms.numel()]
    measures = numbers[2 + carry.terms.numel() :].reshape(carry.sums.shape)
    counts = sum_over_tokens(carry.counts, mesh)
    return numbers[0], numbers[1], carry._replace(terms=terms, counts=counts, sums=measures)


def sum_over_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum over the ranks with different tokens, and over pipeline ranks, where all but the last one have zeros."""
    return all_sum(all_sum(x, mesh.ranks.data), mesh.pp)


def balance_experts(model: Transformer, counts: Tensor, settings: Balancer) -> None:
    """Moves each router's bias against this step's load of its experts. counts: (L, E)."""
    if settings.rate > 0:
        for moe in model.moe_modules():
            update_expert_bias(moe.router.expert_bias, counts[moe.layer], settings.rate, settings.center)


@torch.no_grad()
def measure_terms(runner: Runner, batch: Batch, config: Config, mesh: Mesh, step: int) -> dict[str, float]:
    """The unweighted terms of a global batch, without an update."""
    carry: Carry | None = None
    for inputs in step_inputs(runner.model, batch, config, mesh, step):
        carry = add_carry(carry, runner.evaluate(inputs).carry)
    assert carry is not None
    terms = sum_over_tokens(carry.terms, mesh).tolist()
    return dict(zip(runner.model.terms.names, terms, strict=True))


def check_finite(model: Transformer, result: StepResult) -> None:
    """Raises TrainingError that names the first value that is not finite."""
    values = {"ce": result.ce, **result.routing, "loss": result.loss, "grad_norm": result.grad_norm}
    name = first_non_finite(values)
    if name == "grad_norm":
        name = f"grad_norm (gradient of {non_finite_gradient(model)})"
    if name is not None:
        raise TrainingError(f"{name} is not finite")
