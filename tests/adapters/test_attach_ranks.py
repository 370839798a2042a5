"""DistributedDataParallel and FSDP2 on two ranks give the loss and gradients of one process."""

from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.helpers.moe_families import batch, build
from tests.helpers.ranks import launch
from torchtitan_ext.adapters.transformers import Attached, attach

pytest.importorskip("transformers", reason="the package transformers (extra hf) is not installed")

ROWS = 4
TERMS: dict[str, Any] = {
    "lb": {"weight": 0.3, "scope": "global"},
    "z": 0.02,
    "sp": 1.0,
    "cp": {"weight": 0.7, "source": "transition"},
    "o": 0.1,
    "v": {"weight": 8.0, "scope": "global"},
    "erc": 0.5,
}
# One reduction over ranks more: float32 sums in another order.
TOLERANCE = 1e-6


def attached_to(model: Any) -> Attached:
    attached = attach(model, TERMS)
    attached.step = 1
    return attached


def one_process() -> tuple[float, dict[str, Tensor], dict[str, float]]:
    model = build("qwen3_moe")
    attached = attached_to(model)
    ids, labels = batch(ROWS)
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=(labels[:, 1:] != -100).sum(), use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, attached.metrics()


def two_ranks(kind: str, checkpointed: bool) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    world, rank = dist.get_world_size(), dist.get_rank()
    model: Any = build("qwen3_moe")
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    wrapped = model
    attached = None if kind == "fsdp, attached after" else attached_to(model)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    attached = attached or attached_to(wrapped)
    ids, labels = batch(ROWS)
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    count = (labels[:, 1:] != -100).sum()
    loss = wrapped(input_ids=ids[own], labels=labels[own], num_items_in_batch=count, use_cache=False).loss
    (loss * world).backward()  # as Trainer does, since both wrappers average gradients
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            full = getattr(parameter.grad, "full_tensor", None)
            gradients[name] = parameter.grad if full is None else full()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item(), gradients, attached.metrics(group=dist.group.WORLD)


KINDS = [(kind, checkpointed) for kind in ("ddp", "fsdp", "fsdp, attached after") for checkpointed in (False, True)]


def all_kinds() -> list[tuple[float, dict[str, Tensor], dict[str, float]]]:
    return [two_ranks(*kind) for kind in KINDS]


@pytest.mark.slow
def test_two_ranks_equal_one() -> None:
    loss, gradients, metrics = one_process()
    for results in launch(2, all_kinds):
        for kind, (other, found, measured) in zip(KINDS, results, strict=True):
            assert other == pytest.approx(loss, rel=TOLERANCE), kind
            assert measured == pytest.approx(metrics, rel=5 * TOLERANCE, abs=TOLERANCE), kind
            assert found.keys() == gradients.keys(), kind
            for name, gradient in gradients.items():
                scale = max(gradient.abs().max().item(), 0.1)
                worst = (found[name] - gradient).abs().max().item()
                assert worst <= 5 * TOLERANCE * scale, (kind, name)
