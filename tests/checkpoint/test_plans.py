"""Plans of checkpoints that are kept from one save to the next, what a rank reads, and how many CPUs hash."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tests.helpers.ranks import launch
from tests.helpers.steps import VOCABULARY, config_of, mesh_of
from titan_moe.checkpoint import dcp
from titan_moe.checkpoint.dcp import PlanCache, read_tensors, tensors, write_tensors
from titan_moe.model.gemm import local
from titan_moe.runtime import cpus
from titan_moe.train.build import build_model

WORLD = 2


def state_of(words: list[str], world: int) -> dict[str, torch.Tensor]:
    config = config_of(words, world)
    return tensors(build_model(config, VOCABULARY, mesh_of(config, world)), None)


def fill(state: dict[str, torch.Tensor], value: float) -> None:
    with torch.no_grad():
        for x in state.values():
            local(x).fill_(value)


def check(path: Path, state: dict[str, torch.Tensor], value: float) -> None:
    """Every tensor of the checkpoint has this value."""
    fill(state, -1.0)
    read_tensors(path, state)
    assert all(bool((local(x) == value).all()) for x in state.values())


def saves(folder: Path) -> list[int]:
    """Items of the plans that reach rank 0 in six saves: two, a failed one, one after it, one with a tensor less, and one of
    another model in the same process."""
    state, plans, group = state_of([], WORLD), PlanCache(), dist.group.WORLD
    received: list[int] = []
    merge = DefaultSavePlanner.create_global_plan

    def counting(planner: DefaultSavePlanner, all_plans: list[Any]) -> Any:
        received.append(sum(len(plan.items) for plan in all_plans))
        return merge(planner, all_plans)

    def save(name: str, tensors: dict[str, torch.Tensor], plans: PlanCache, value: float) -> None:
        fill(tensors, value)
        write_tensors(folder / name, tensors, group, plans.planner())
        check(folder / name, tensors, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefaultSavePlanner, "create_global_plan", counting)
        save("first", state, plans, 1.0)
        save("second", state, plans, 2.0)
        if dist.get_rank() == 0:
            (folder / "file").touch()
        dist.barrier()
        with pytest.raises(OSError, match="file"):
            write_tensors(folder / "file" / "third", state, group, plans.planner())
        plans.forget()
        save("fourth", state, plans, 4.0)
        save("fifth", {name: x for name, x in state.items() if name != "model.embedding"}, plans, 5.0)
        save("sixth", state_of(["--model.layers=2"], WORLD), PlanCache(), 6.0)
    return received


def test_only_the_first_save_sends_plans(tmp_path: Path) -> None:
    """And every checkpoint is complete: with the same tensors again, after a failed save, and with other tensors."""
    first, again, *others = launch(WORLD, saves, tmp_path)[0]
    assert first > 0
    assert again == 0
    fourth, fifth, sixth = others[-3:]
    assert fourth == first
    assert 0 < fifth < first
    assert 0 < sixth < first


def bytes_read(folder: Path, words: list[str], world: int) -> tuple[int, int]:
    """Bytes of the stored parts that this rank reads, and of the shards that it fills."""
    state, parts = state_of(words, world), {}

    class Counting(dcp._Reader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            parts.update({item.storage_index: self.storage_data[item.storage_index].length for item in plan.items})
            return super().read_data(plan, planner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp, "_Reader", Counting)
        read_tensors(folder, state)
    return sum(parts.values()), sum(local(x).numel() * x.element_size() for x in state.values())


def written(folder: Path, words: list[str], world: int) -> int:
    """Writes a checkpoint and returns the number of its tensors."""
    state = state_of(words, world)
    write_tensors(folder, state, dist.group.WORLD if world > 1 else None)
    return len(state)


def test_a_rank_reads_its_shards_only(tmp_path: Path) -> None:
    """On the layout that wrote it. A part has up to 2 KiB of its archive beside its values."""
    words = ["--model.moe.hidden_dim=256"]
    count = launch(WORLD, written, tmp_path, words, WORLD)[0]
    for read, own in launch(WORLD, bytes_read, tmp_path, words, WORLD):
        assert own < read < own + count * 2048


@pytest.mark.parametrize(
    ("ranks", "affinity", "machine", "quota", "wanted"),
    [
        (1, 8, 8, 8.0, 8),
        (4, 8, 8, 8.0, 2),
        (16, 8, 8, 8.0, 1),
        (4, 2, 8, 8.0, 2),  # a scheduler has given each rank two CPUs of its own
        (2, 64, 64, 4.0, 2),  # the limit of a container
    ],
)
def test_ranks_of_a_node_divide_its_cpus(
    ranks: int, affinity: int, machine: int, quota: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(cpus, "ALLOWED", frozenset(range(affinity)))
    monkeypatch.setattr(cpus, "cgroup_cpus", lambda: quota)
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    assert cpus.cpus_of_rank() == wanted
