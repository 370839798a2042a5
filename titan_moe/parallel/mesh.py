"""Device meshes and process groups of a run: for dense parameters, for experts, and for data."""

import datetime
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_moe.config.degrees import Degrees
from titan_moe.errors import LostRanksError
from titan_moe.runtime.rendezvous import join
from torchtitan_ext.collectives import Group, Ranks

T = TypeVar("T")

PREPARATION = datetime.timedelta(days=1)  # for rank 0 to read and tokenise the text, while the others wait
_host_groups: list[Group] = []
"""On GPUs: the group in which ranks wait for rank 0. NCCL's watchdog would end them after `parallelism.timeout_seconds`."""


class Mesh:
    """This process's coordinates and groups. With one process all groups are None and nothing is communicated."""

    def __init__(self, degrees: Degrees, device: torch.device) -> None:
        self.degrees, self.device = degrees, device
        self.rank = self.data_rank = self.cp_rank = 0
        self.dense: DeviceMesh | None = None
        """FSDP mesh of all parameters but the experts': (fsdp,) or (dp_replicate, fsdp)."""
        self.expert_dense: DeviceMesh | None = None
        """FSDP mesh of the experts, orthogonal to ep: (efsdp,) or (dp_replicate, efsdp)."""
        self.ep: DeviceMesh | None = None
        self.tp: DeviceMesh | None = None
        self.expert_shards: DeviceMesh | None = None
        """Mesh that experts and their hidden units are sharded over: (ep,), (tp,) or (ep, tp)."""
        self.pp: Group | None = None
        self.everyone: Group | None = None
        self.ranks = Ranks()
        self.cp: Group | None = None
        if degrees.world == 1:
            return
        d = degrees
        self.rank = dist.get_rank()
        root = init_device_mesh(device.type, (d.world,), mesh_dim_names=("world",))
        self.everyone = root.get_group()
        dense = root._unflatten(0, (d.pp, d.dp_replicate, d.fsdp, d.tp), ("pp", "dp_replicate", "fsdp", "tp"))
        names = ("pp", "dp_replicate", "efsdp", "ep", "tp")
        experts = root._unflatten(0, (d.pp, d.dp_replicate, d.expert_fsdp, d.ep, d.tp), names)
        data = root._unflatten(0, (d.pp, d.data, d.cp, d.tp), ("pp", "data", "cp", "tp"))
        tokens = root._unflatten(0, (d.pp, d.token_ranks, d.tp), ("pp", "tokens", "tp"))
        self.pp = dense["pp"].get_group() if d.pp > 1 else None
        replicated = d.dp_replicate > 1
        self.dense = dense["dp_replicate", "fsdp"] if replicated else dense["fsdp"]
        self.expert_dense = experts["dp_replicate", "efsdp"] if replicated else experts["efsdp"]
        self.ep = experts["ep"] if d.ep > 1 else None
        self.tp = dense["tp"] if d.tp > 1 else None
        sharded = tuple(name for name, size in (("ep", d.ep), ("tp", d.tp)) if size > 1)
        self.expert_shards = experts[sharded] if sharded else None
        self.cp = data["cp"].get_group() if d.cp > 1 else None
        self.ranks = Ranks(data=tokens["tokens"].get_group() if d.token_ranks > 1 else None, sequence=self.cp)
        self.data_rank, self.cp_rank = data["data"].get_local_rank(), data["cp"].get_local_rank()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and logs for the whole run."""
        return self.rank == 0


def single(device: torch.device) -> Mesh:
    """The mesh of one process."""
    return Mesh(Degrees(1, 1, 1, 1, 1, 1), device)


def start_processes(device: torch.device, timeout_seconds: int) -> None:
    """Initialises the process group if the environment names more than one rank. Raises UserError, LostRanksError."""
    if int(os.environ.get("WORLD_SIZE") or "1") == 1 or dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, rank, ranks = join(timeout)
        # torchrun's store outlives a restart, and still has the addresses of the ranks that ran before.
        store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
        gpu = device if device.type == "cuda" else None  # NCCL connects at once, and never guesses the device
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout, device_id=gpu)
        if gpu is not None:
            _host_groups.append(dist.new_group(backend="gloo", timeout=PREPARATION))
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise LostRanksError(f"not all ranks started within {timeout_seconds} s: {reason}") from error


def limit_waiting(timeout_seconds: int) -> None:
    """Sets the timeout of every group. Without this, a device mesh's groups have PyTorch's default of 30 minutes."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_seconds), group)


def from_first(make: Callable[[], T]) -> T:
    """Calls `make()` on rank 0, then on the other ranks, which exit with status 2 if it failed on rank 0."""
    if not dist.is_initialized():
        return make()
    done, group = [False], _host_groups[0] if _host_groups else None
    if dist.get_rank() == 0:
        try:
            result = make()
            done[0] = True
        finally:
            dist.broadcast_object_list(done, group=group)
        return result
    dist.broadcast_object_list(done, group=group)
    if not done[0]:
        sys.exit(2)
    return make()


def stop_processes() -> None:
    if dist.is_initialized():
        _host_groups.clear()
        dist.destroy_process_group()
