"""Training steps of the medium scale, or of a toy one."""

from collections.abc import Mapping

import torch
from torch import nn

from gpu_checks.inputs import configuration, random_inputs
from gpu_checks.report import Report
from gpu_checks.timing import Work
from titan_moe.config.tables import Config
from titan_moe.data.loader import Batch
from titan_moe.estimate.counts import count, meta_model
from titan_moe.model.terms import terms_of
from titan_moe.model.transformer import Transformer
from titan_moe.optim import build_optimizer
from titan_moe.parallel.mesh import single
from titan_moe.parallel.parallelize import build_runner, parallelize
from titan_moe.runtime.device import peak_flops
from titan_moe.runtime.stopping import Stopping
from titan_moe.train.step import train_step
from titan_moe.train.step_log import StepLog


def random_batch(report: Report, config: Config) -> Batch:
    """A global batch, in pinned memory if there is a card, as the loader hands it over."""
    inputs = random_inputs(config.model.vocab_size, config.training.batch_size, config.training.seq_len)
    mask = torch.ones_like(inputs.tokens, dtype=torch.bool)
    batch = Batch(
        inputs.tokens, inputs.labels, mask, inputs.document_ids, inputs.positions, inputs.sequences, mask.numel()
    )
    if report.on_card:
        pinned = {
            name: x.contiguous().pin_memory() for name, x in batch._asdict().items() if isinstance(x, torch.Tensor)
        }
        return Batch(**(batch._asdict() | pinned))
    return batch


def meta_transformer(config: Config) -> Transformer:
    with torch.device("meta"):
        return Transformer(config.model, terms_of(config), getattr(torch, config.training.dtype))


def finished(model: Transformer, config: Config, report: Report) -> Transformer:
    """The model as a run prepares it (float8, recomputation, compilation), with random weights on the device.

    The weights are drawn on the device: a run's own initialization draws them on the CPU, which takes a minute here."""
    parallelize(model, config, single(report.device))
    model.to_empty(device=report.device)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("expert_bias"):
            nn.init.zeros_(tensor)
        elif tensor.dim() == 1:
            nn.init.ones_(tensor)
        else:
            nn.init.normal_(tensor, std=tensor.shape[-1] ** -0.5)
    return model


def share_weights(model: Transformer, other: Transformer) -> None:
    """Gives `model` the parameters and buffers of `other`, so that two models need the memory of one."""
    for (path, module), (other_path, twin) in zip(model.named_modules(), other.named_modules(), strict=True):
        assert path == other_path
        module._parameters.update(twin._parameters)
        module._buffers.update(twin._buffers)


def step_of(model: Transformer, config: Config, optimizer: torch.optim.Optimizer, report: Report) -> Work:
    """A training step of the trainer: forward, loss, backward, clipping, update."""
    mesh = single(report.device)
    runner = build_runner(model, config, mesh)
    log = StepLog(model, optimizer, Stopping(mesh.everyone, report.device), deferred=True)  # as runs on a card have it
    batches = random_batch(report, config).split(config.training.microbatch_size)
    return lambda: train_step(runner, optimizer, batches, config, mesh, 1, {}, log)


def steps_of(report: Report, arms: Mapping[str, list[str]]) -> dict[str, Work]:
    """A training step of medium for each list of overrides. All arms train the same weights with one optimizer."""
    steps: dict[str, Work] = {}
    first: Transformer | None = None
    optimizer: torch.optim.Optimizer | None = None
    for label, overrides in arms.items():
        config = configuration(report, "medium", overrides)
        model = finished(meta_transformer(config), config, report) if first is None else meta_transformer(config)
        if first is None or optimizer is None:
            first, optimizer = model, build_optimizer(model, config.optimizer)
        else:
            parallelize(model, config, single(report.device))
            share_weights(model, first)
        steps[label] = step_of(model, config, optimizer, report)
    return steps


def tokens_of_step(config: Config) -> int:
    return config.training.batch_size * config.training.seq_len


def utilization(report: Report, config: Config, milliseconds: float) -> float:
    """Share of the bfloat16 peak: FLOPs of the model, recomputation not counted, over time."""
    flops = count(meta_model(config.model, torch.bfloat16), config.training.seq_len).flops_per_token
    return flops * tokens_of_step(config) / (milliseconds / 1e3) / peak_flops(report.device, torch.bfloat16)
