"""Training steps in the layout of expert parallelism, on one rank with real process groups, against those without.

One rank sends all rows to itself: NCCL (on a CPU gloo), the all-to-all, FSDP's gathers and reductions and all sums run,
and the numbers must be those of a process without groups.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gpu_checks.inputs import TOY, random_inputs
from gpu_checks.report import Report
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.data.loader import Batch
from titan_moe.errors import UserError
from titan_moe.model.gemm import full
from titan_moe.optim import build_optimizer
from titan_moe.parallel.mesh import Mesh, single
from titan_moe.parallel.parallelize import build_runner
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step
from torchtitan_ext.collectives import Group, Ranks

Layout = Callable[[Mesh, list[Group]], None]

STEPS = 3
TERMS = ["--regularizers.o.weight=1e-3", "--regularizers.v.weight=1e-3", "--regularizers.v.scope=global"]
SAMPLE, SKETCH = ["--regularizers.sp.method=sample"], ["--regularizers.sp.method=sketch"]


def all_to_all(mesh: Mesh, groups: list[Group]) -> None:
    """The experts sharded over their ranks, nothing else."""
    names, shape = ("efsdp", "ep"), torch.zeros(1, 1, dtype=torch.int)
    root = DeviceMesh.from_group(groups[1:], mesh.device.type, shape, mesh_dim_names=names)
    mesh.expert_dense = root["efsdp"]
    mesh.ep = mesh.expert_shards = root["ep"]


def fsdp(mesh: Mesh, groups: list[Group]) -> None:
    """All parameters sharded; the experts over the same ranks."""
    mesh.dense = mesh.expert_dense = DeviceMesh.from_group(groups[0], mesh.device.type, mesh_dim_names=("fsdp",))


def both(mesh: Mesh, groups: list[Group]) -> None:
    fsdp(mesh, groups)
    all_to_all(mesh, groups)


LAYOUTS: dict[str, tuple[Layout, list[str]]] = {
    "all-to-all, sp exact": (all_to_all, []),
    "all-to-all, sp by sample": (all_to_all, SAMPLE),
    "all-to-all, sp by sketch": (all_to_all, SKETCH),
    "FSDP": (fsdp, []),
    "all-to-all and FSDP": (both, []),
}


def grouped(device: torch.device, layout: Layout, groups: list[Group]) -> Mesh:
    """A mesh of one rank whose groups exist, so that everything is communicated.

    Not by `init_device_mesh`: it would give every dimension the group of all ranks, and FSDP wants one of its own for
    the experts."""
    mesh = single(device)
    mesh.everyone, mesh.ranks = groups[0], Ranks(data=groups[0])
    layout(mesh, groups)
    return mesh


def configuration(dtype: str, more: list[str]) -> Config:
    sizes = ["--training.batch_size=4", "--training.seq_len=64", "--model.layers=3", f"--training.dtype={dtype}"]
    sizes += ["--training.microbatch_size=2", "--compile.enable=false"]
    return load_config(
        "medium",
        [*TOY, *sizes, *TERMS, *more],
        reads_files=False,
    )


def train(config: Config, mesh: Mesh) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Loss and gradient norm of every step, and the parameters after the last, in float64 on the CPU."""
    model = build_model(config, config.model.vocab_size, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    runner = build_runner(model, config, mesh)
    inputs = random_inputs(config.model.vocab_size, config.training.batch_size, config.training.seq_len)
    mask = torch.ones_like(inputs.tokens, dtype=torch.bool)
    whole = (inputs.tokens, inputs.labels, mask, inputs.document_ids, inputs.positions, inputs.sequences)
    batches = Batch(*whole, label_count=mask.numel()).split(config.training.microbatch_size)
    results = [train_step(runner, optimizer, batches, config, mesh, step, {}) for step in range(1, STEPS + 1)]
    losses, norms = ([float(getattr(r, name)) for r in results] for name in ("loss", "grad_norm"))
    return losses, norms, {name: full(p.detach()).double().cpu() for name, p in model.named_parameters()}


def relative(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def stage(report: Report) -> None:
    """float64 to 1e-9, as the tests ask of every layout; bfloat16, where updates amplify rounding, the loss to 2e-2."""
    backend = "nccl" if report.on_card else "gloo"
    report.line(f"{backend}, one rank, {STEPS} steps with all terms but erc; {stage.__doc__}")
    report.table("layout", "type", "loss", "gradient norm", "parameters")
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)  # type: ignore[attr-defined]
        more = {"device_id": report.device} if report.on_card else {}
        dist.init_process_group(backend, store=store, rank=0, world_size=1, **more)  # type: ignore[arg-type]
        groups: Any = [dist.new_group([0]) for _ in range(3)]
        for label, (layout, options) in LAYOUTS.items():
            for dtype in ("float64", "bfloat16"):
                with report.trial(f"{label}, {dtype}"):
                    compare(report, label, configuration(dtype, options), layout, groups)
        dist.destroy_process_group()


def compare(report: Report, label: str, config: Config, layout: Layout, groups: list[Group]) -> None:
    dtype = config.training.dtype
    try:
        found = train(config, grouped(report.device, layout, groups))
    except UserError as error:  # what this version of PyTorch cannot do
        report.row(label, dtype, f"refused: {error}")
        return
    wanted = train(config, single(report.device))
    if dtype == "bfloat16":
        report.row(label, dtype, report.equal(relative(found[0], wanted[0]), 2e-2))
        return
    off = max(((found[2][name] - p).norm() / p.norm()).item() for name, p in wanted[2].items())
    errors = [relative(found[0], wanted[0]), relative(found[1], wanted[1]), off]
    report.row(label, dtype, *(report.equal(error, 1e-9) for error in errors))
