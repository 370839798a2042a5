"""One optimizer step: batch, forward, loss, backward, clip, step, balance."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_moe.config.tables import Config
from titan_moe.data.loader import Batch
from titan_moe.errors import TrainingError
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.context import take_part
from titan_moe.parallel.fsdp import reduce_gradients, sum_router_gradients
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.norm import clip_gradients
from titan_moe.parallel.tensor import sum_norm_gradients
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
    """Whether the update was left out."""


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    config: Config,
    mesh: Mesh,
    step: int,
    factors: Mapping[str, float],
    spikes: Spikes | None = None,
) -> StepResult:
    """One optimizer step on this rank's micro-batches. factors: on the terms' weights at this step. spikes: may leave the
    update out.

    Raises TrainingError, before the update and on all ranks, for a value that is not finite.
    """
    dtype = accumulation_dtype(model.dtype)
    loss = ce = torch.zeros((), dtype=dtype, device=mesh.device)
    carry: Carry | None = None
    inputs = [model_inputs(batch, dtype, mesh, step, first=number == 0) for number, batch in enumerate(batches)]
    if model.pipeline is not None:
        carry = model.empty_carry(0, mesh.device)  # of a rank without the last stage
        for result in model.pipeline.step(inputs, factors):
            objective = result.ce + model.terms.objective(result.carry.terms, factors)
            loss, ce, carry = loss + objective, ce + result.ce, add_carry(carry, result.carry)
    else:
        for number, one in enumerate(inputs):
            reduce_gradients(model, now=number == len(inputs) - 1 or not config.parallelism.defer_reduction)
            out = model(one)
            objective = out.ce + model.terms.objective(out.carry.terms, factors)
            objective.backward()
            loss, ce, carry = loss + objective.detach(), ce + out.ce.detach(), add_carry(carry, out.carry)
    assert carry is not None
    loss, ce, carry = sum_over_ranks(loss, ce, carry, mesh)
    sum_router_gradients(model, mesh)
    sum_norm_gradients(model, mesh.tp)
    norm = clip_gradients(list(model.parameters()), config.training.max_grad_norm, mesh.pp)
    result = StepResult(loss.item(), ce.item(), carry, routing_row(carry, model.terms), norm.item())
    check_finite(model, result)
    if spikes is not None and spikes.over(result.grad_norm):
        optimizer.zero_grad()
        return result._replace(skipped=True)
    optimizer.step()
    optimizer.zero_grad()
    if config.balancer.rate > 0:
        for moe in model.moe_modules():
            update_expert_bias(
                moe.router.expert_bias, carry.counts[moe.layer], config.balancer.rate, config.balancer.center
            )
    return result


def model_inputs(batch: Batch, dtype: torch.dtype, mesh: Mesh, step: int, first: bool) -> Inputs:
    """The model's view of a micro-batch, this rank's part of its sequences. Terms that no token enters are computed in the
    first one, and every rank adds its share of them."""
    share = 1.0 / mesh.degrees.token_ranks if first else 0.0
    return take_part(to_inputs(batch, dtype, mesh.device, step, share), mesh.degrees.cp, mesh.cp_rank)


def sum_over_ranks(loss: Tensor, ce: Tensor, carry: Carry, mesh: Mesh) -> tuple[Tensor, Tensor, Carry]:
    """What a step reports, over all ranks: one sum of numbers, one of counts."""
    numbers = over_tokens(torch.cat([loss.reshape(1), ce.reshape(1), carry.terms, carry.sums.flatten()]), mesh)
    terms = numbers[2 : 2 + carry.terms.numel()]
    sums = numbers[2 + carry.terms.numel() :].reshape(carry.sums.shape)
    counts = over_tokens(carry.counts, mesh)
    return numbers[0], numbers[1], carry._replace(terms=terms, counts=counts, sums=sums)


def over_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum over all ranks' tokens; of a pipeline, only the last stage has something to add."""
    return all_sum(all_sum(x, mesh.ranks.data), mesh.pp)


@torch.no_grad()
def measure_terms(model: Transformer, batches: Sequence[Batch], mesh: Mesh, step: int) -> dict[str, float]:
    """The terms of a global batch, unweighted, without an update. batches: this rank's micro-batches."""
    carry: Carry | None = None
    dtype = accumulation_dtype(model.dtype)
    for number, batch in enumerate(batches):
        inputs = model_inputs(batch, dtype, mesh, step, first=number == 0)
        _, found, _ = model.evaluate(inputs) if model.pipeline is None else model.pipeline.evaluate(inputs)
        carry = add_carry(carry, found)
    assert carry is not None
    return dict(zip(model.terms.names, over_tokens(carry.terms, mesh).tolist(), strict=True))


def check_finite(model: Transformer, result: StepResult) -> None:
    values = {"ce": result.ce, **result.routing, "loss": result.loss, "grad_norm": result.grad_norm}
    name = first_non_finite(values)
    if name == "grad_norm":
        name = f"grad_norm (gradient of {non_finite_gradient(model)})"
    if name is not None:
        raise TrainingError(f"{name} is not finite")
