"""A few training steps of a tiny model on any layout, and everything that must not depend on it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_moe.checkpoint.dcp import load_checkpoint, tensors, write_tensors
from titan_moe.config.degrees import micro_batch_size, resolve
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.data.loader import Batch, DataRank
from titan_moe.model.moe import Choice, MoELayer, Router
from titan_moe.model.transformer import Transformer
from titan_moe.optim import build_optimizer
from titan_moe.parallel.mesh import Mesh
from titan_moe.parallel.parallelize import build_runner, sum_replicated_gradients
from titan_moe.train.build import build_model
from titan_moe.train.step import step_inputs, train_step

VOCABULARY, SEQ, BATCH = 62, 16, 8
TERMS = ("lb", "z", "sp", "cp", "o", "v", "erc")
BASE = [
    "--model.dim=16",
    "--model.layers=3",
    "--model.heads=2",
    "--model.moe.experts=8",
    "--model.moe.top_k=3",
    "--model.moe.hidden_dim=8",
    f"--training.seq_len={SEQ}",
    f"--training.batch_size={BATCH}",
    "--training.dtype=float64",
    "--optimizer.lr=1e-2",
    "--regularizers.lb.weight=0.01",
    "--regularizers.z.weight=0.001",
    "--regularizers.sp.weight=0.02",
    "--regularizers.cp.weight=0.01",
    "--regularizers.o.weight=0.01",
    "--regularizers.v.weight=0.01",
    "--regularizers.erc.weight=0.1",
]
VANILLA: list[str] = []
DEEPSEEK = [
    "--model.moe.score=sigmoid",
    "--model.moe.normalize_topk=true",
    "--model.moe.shared_experts=1",
    "--model.moe.first_dense_layers=1",
    "--balancer.rate=0.01",
]


class Outcome(NamedTuple):
    """What five steps gave; equal on every rank."""

    rows: list[dict[str, float]]
    counts: Tensor
    """(steps, layers, experts)."""
    parameters: dict[str, Tensor]
    routing: Tensor
    """(steps, layers, BATCH, SEQ, top_k), the chosen experts of this rank's tokens; -1 for others."""
    gap: float
    """Least distance between the last chosen expert and the best other one."""


class Watch:
    """What the routers of a model choose."""

    def __init__(self, model: Transformer, steps: int) -> None:
        settings = model.settings.moe
        self.step, self.gap = 0, float("inf")
        self.routing = torch.full((steps, model.moe_layers, BATCH, SEQ, settings.top_k), -1)
        for moe in model.moe_modules():
            moe.register_forward_hook(self.layer)
            moe.router.register_forward_hook(self.router)

    def layer(self, moe: MoELayer, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        tokens, ids = inputs[2], output[2]
        routing = self.routing[self.step, moe.layer]
        routing[tokens.sequences.unsqueeze(1), tokens.sequence_positions] = ids.view(*tokens.weights.shape, -1)

    def router(self, router: Router, inputs: tuple[Any, ...], output: tuple[Choice, Any]) -> None:  # noqa: ARG002
        logits = output[0].logits_TE.detach()
        scores = logits.softmax(-1) if router.moe.score == "softmax" else logits.sigmoid()
        best = (scores + router.expert_bias).topk(router.moe.top_k + 1, dim=-1).values
        self.gap = min(self.gap, float((best[:, -2] - best[:, -1]).min()))


def config_of(words: list[str], world: int) -> Config:
    return load_config("debug", [*BASE, *words], world_size=world)


def mesh_of(config: Config, world: int) -> Mesh:
    return Mesh(resolve(config.parallelism, world, str), torch.device("cpu"))


def batch_of(step: int) -> Batch:
    """Sequences with different numbers of labels, one of them with a single one; two documents in each."""
    source = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQ + 1), generator=source)
    mask = torch.rand(BATCH, SEQ, generator=source) > 0.3
    mask[2, 1:] = False
    mask[2, 0] = True
    documents = (torch.arange(SEQ) >= 6).to(torch.int64).expand(BATCH, SEQ) + 2 * torch.arange(BATCH).unsqueeze(1)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, documents, positions, torch.arange(BATCH), int(mask.sum()))


def rank_part(batch: Batch, config: Config, mesh: Mesh) -> list[Batch]:
    """This rank's micro-batches of a global batch, as the loader would give them."""
    part = DataRank(micro_batch_size(config, mesh.degrees), mesh.data_rank, mesh.degrees.data)
    return batch.rows(torch.from_numpy(part.rows(len(batch.tokens)))).split(part.size)


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def train(
    words: list[str],
    world: int,
    steps: int = 5,
    first: int = 1,
    load_from: Path | None = None,
    save_to: Path | None = None,
) -> Outcome:
    """Steps `first` to `steps`. load_from, save_to: checkpoints before the first and after the last one."""
    config = config_of(words, world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    runner = build_runner(model, config, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    if load_from is not None:
        load_checkpoint(load_from, model, optimizer)
    rows, counts = [], []
    watch = Watch(model, steps - first + 1) if config.compile.enable is not True else None
    for step in range(first, steps + 1):
        if watch is not None:
            watch.step = step - first
        result = train_step(runner, optimizer, rank_part(batch_of(step), config, mesh), config, mesh, step, {})
        terms = dict(zip(model.terms.names, result.carry.terms.tolist(), strict=True))
        rows.append({"loss": result.loss.item(), "ce": result.ce.item(), "grad_norm": result.grad_norm.item(), **terms})
        counts.append(result.carry.counts)
    if save_to is not None:
        write_tensors(save_to, tensors(model, optimizer), dist.group.WORLD if world > 1 else None)
    parameters = {name: whole(p) for name, p in state(model).items()}
    if watch is None:
        return Outcome(rows, torch.stack(counts), parameters, torch.full((), -1), float("nan"))
    return Outcome(rows, torch.stack(counts), parameters, watch.routing, watch.gap)


def state(model: Transformer) -> dict[str, Tensor]:
    return dict(model.state_dict())


def gradients(words: list[str], world: int) -> dict[str, Tensor]:
    """Every parameter's gradient on one global batch."""
    config = config_of(words, world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    runner = build_runner(model, config, mesh)
    runner.forward_backward(step_inputs(model, rank_part(batch_of(1), config, mesh), mesh, 1), {})
    sum_replicated_gradients(model, mesh)
    grads: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values()), [name for name, grad in grads.items() if grad is None]
    return {name: whole(grad) for name, grad in grads.items()}
