"""A few training steps of a tiny model on any layout, and everything that must not depend on it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.data.loader import Batch
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.degrees import resolve
from titan_moe.parallel.fsdp import sum_router_gradients
from titan_moe.parallel.mesh import Mesh
from titan_moe.train.optimizer import build_optimizer, set_lr
from titan_moe.train.trainer import build_model, micro_batches, model_inputs, train_step

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


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def train(words: list[str], world: int, steps: int = 5) -> Outcome:
    config = config_of(words, world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    set_lr(optimizer, 1e-2)
    rows, counts = [], []
    for step in range(1, steps + 1):
        result = train_step(model, optimizer, batch_of(step), config, mesh, step, {})
        terms = dict(zip(model.terms.names, result.carry.terms.tolist(), strict=True))
        rows.append({"loss": result.loss, "ce": result.ce, "grad_norm": result.grad_norm, **terms})
        counts.append(result.carry.counts)
    return Outcome(rows, torch.stack(counts), {name: whole(p) for name, p in state(model).items()})


def state(model: Transformer) -> dict[str, Tensor]:
    return dict(model.state_dict())


def gradients(words: list[str], world: int) -> dict[str, Tensor]:
    """Every parameter's gradient on one global batch."""
    config = config_of(words, world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    for number, part in enumerate(micro_batches(batch_of(1), config, mesh)):
        out = model(model_inputs(part, torch.float64, mesh, 1, first=number == 0))
        (out.ce + model.terms.objective(out.carry.terms)).backward()
    sum_router_gradients(model, mesh)
    found: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in found.values()), [name for name, grad in found.items() if grad is None]
    return {name: whole(grad) for name, grad in found.items()}
