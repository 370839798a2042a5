"""Training steps in the layout of expert parallelism, on one rank with real process groups, against those without.

One rank sends all rows to itself: NCCL (on a CPU gloo), the all-to-all, FSDP's gathers and reductions and all sums run,
and the numbers must be those of a process without groups.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gpu_checks.models import TOY, random_inputs
from gpu_checks.report import Report
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.data.loader import Batch
from titan_moe.model.gemm import full
from titan_moe.optim import build_optimizer
from titan_moe.parallel.mesh import Mesh, single
from titan_moe.parallel.parallelize import build_runner
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step
from torchtitan_ext.collectives import Ranks

STEPS = 3
TERMS = ["--regularizers.o.weight=1e-3", "--regularizers.v.weight=1e-3", "--regularizers.v.scope=global"]
METHODS = {
    "sp exact": [],
    "sp by sample": ["--regularizers.sp.method=sample"],
    "sp by sketch": ["--regularizers.sp.method=sketch"],
}


def grouped(device: torch.device) -> Mesh:
    """A mesh of one rank whose groups exist, so that everything is communicated."""
    mesh = single(device)
    # `init_device_mesh` would give every dimension the group of all ranks; FSDP wants one of its own for the experts.
    groups = [dist.new_group([0]) for _ in range(3)]
    mesh.dense = DeviceMesh.from_group(groups[0], device.type, mesh_dim_names=("fsdp",))
    names = ("efsdp", "ep")
    root = DeviceMesh.from_group(groups[1:], device.type, torch.zeros(1, 1, dtype=torch.int), mesh_dim_names=names)
    mesh.expert_dense = root["efsdp"]
    mesh.ep = mesh.expert_shards = root["ep"]
    mesh.everyone = groups[0]
    mesh.ranks = Ranks(data=groups[0])
    return mesh


def configuration(dtype: str, more: list[str]) -> Config:
    sizes = ["--training.batch_size=4", "--training.seq_len=64", "--model.layers=3", f"--training.dtype={dtype}"]
    return load_config("medium", [*TOY, *sizes, "--training.microbatch_size=2", *TERMS, *more], reads_files=False)


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
    report.line(f"{backend}, world 1, {STEPS} steps with all terms but erc; {stage.__doc__}")
    report.table("what", "type", "loss", "gradient norm", "parameters")
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)  # type: ignore[attr-defined]
        more = {"device_id": report.device} if report.on_card else {}
        dist.init_process_group(backend, store=store, rank=0, world_size=1, **more)  # type: ignore[arg-type]
        mesh = grouped(report.device)
        for label, options in METHODS.items():
            for dtype in ("float64", "bfloat16"):
                with report.trial(f"{label}, {dtype}"):
                    config = configuration(dtype, options)
                    wanted, found = train(config, single(report.device)), train(config, mesh)
                    if dtype == "bfloat16":
                        report.row(label, dtype, report.equal(relative(found[0], wanted[0]), 2e-2))
                        continue
                    off = max(((found[2][n] - p).norm() / p.norm()).item() for n, p in wanted[2].items())
                    pairs = zip(found[:2], wanted[:2], strict=True)
                    errors = [*(relative(f, w) for f, w in pairs), off]
                    report.row(label, dtype, *(report.equal(error, 1e-9) for error in errors))
        dist.destroy_process_group()
