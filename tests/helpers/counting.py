"""Bytes that a rank passes to every collective, and calls, counted by wrapping torch.distributed's functions."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining import schedules

from torchtitan_ext.collectives import ALL_GATHER, REDUCE_SCATTER

# torch.distributed's name -> (the plan's name, position and keyword of the payload argument).
COLLECTIVES = {
    "all_to_all_single": ("all-to-all", 1, "input"),
    "all_reduce": ("all-reduce", 0, "tensor"),
    "all_gather": ("all-gather", 1, "tensor"),
    ALL_GATHER: ("all-gather", 1, "input_tensor"),
    REDUCE_SCATTER: ("reduce-scatter", 1, "input"),
}


@contextlib.contextmanager
def counted(calls: Counter[str] | None = None) -> Iterator[dict[str, int]]:
    """Bytes by the plan's name of the collective; groups of one rank included. calls: receives how often each is called."""
    sent = dict.fromkeys(["send", *(name for name, _, _ in COLLECTIVES.values())], 0)

    def counting(original: Any, kind: str, position: int, keyword: str) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            payload = tensors[position] if len(tensors) > position else options[keyword]
            sent[kind] += payload.numel() * payload.element_size()
            if calls is not None:
                calls[kind] += 1
            return original(*tensors, **options)

        return call

    def count_sends(operations: list[dist.P2POp]) -> None:
        tensors = [one.tensor for one in operations if one.op is dist.isend]
        sent["send"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def batch(operations: list[dist.P2POp]) -> Any:
        count_sends(operations)
        return send_batch(operations)

    def schedule_batch(operations: list[dist.P2POp], desc: str | None = None) -> Any:
        if {one.op for one in operations} == {dist.isend}:  # the schedules pass mixed ones on to `batch`
            count_sends(operations)
        return send_schedule_batch(operations, desc)

    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    send_batch, send_schedule_batch = dist.batch_isend_irecv, schedules._batch_p2p
    for name, how in COLLECTIVES.items():
        setattr(dist, name, counting(originals[name], *how))
    dist.batch_isend_irecv, schedules._batch_p2p = batch, schedule_batch
    try:
        yield sent
    finally:
        dist.batch_isend_irecv, schedules._batch_p2p = send_batch, send_schedule_batch
        for name, original in originals.items():
            setattr(dist, name, original)
