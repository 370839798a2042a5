"""TorchTitan's own Trainer and parallelisms with the override, on a CPU: options, logged metrics, several ranks."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.commands import ROOT
from tests.helpers.ranks import launch
from tests.helpers.torchtitan_cpu import assets, prepare
from tests.helpers.torchtitan_models import ENTRY, batch, built, checkpointing, configuration, override, step

pytest.importorskip("torchtitan")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:.*register_constant")]

TERMS = {"lb": 0.1, "z": 1e-2, "sp": 5.0, "cp": 0.3, "o": 10.0, "v": 0.5}
# Gradients of experts are rounded to bfloat16 on each rank before they are summed: 2^-9 of each part.
BFLOAT16 = 2.0**-8


def trained(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """One rank of TorchTitan's train.py."""
    if not (folder / "tests").exists():
        assets(folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", "tests.helpers.torchtitan_cpu", "--module", "tests.helpers.torchtitan_cpu"]
    return subprocess.run(
        [*command, "--config", "qwen3_small", *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=240,
        check=False,
    )


def logged(folder: Path) -> dict[str, list[float]]:
    """Values by tag, of every step, from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_trainer_with_one_option(tmp_path: Path) -> None:
    fixed = ["--debug.seed", "1", "--training.disable_cuda_graphs"]
    terms = f'{ENTRY}={{"sp": 0.01, "cp": {{"weight": 0.5, "source": "activated"}}, "measure": ["z"]}}'
    for name, options in (("stock", []), ("with_terms", ["--override.imports", terms])):
        done = trained(tmp_path, *fixed, "--metrics.save_tb_folder", name, *options)
        assert done.returncode == 0, done.stderr
    stock, run = (logged(tmp_path / "outputs" / name) for name in ("stock", "with_terms"))

    added = {
        "reg/sp",
        "reg/cp",
        "reg/z",
        *(f"moe/{name}" for name in ("entropy", "topk_mass", "overlap", "max_vio", "dead")),
    }
    cross_entropy = "loss_metrics/cross_entropy"
    assert set(run) - set(stock) == {cross_entropy, *added}
    # The first step's cross-entropy is that of the stock run; then the terms have moved the parameters.
    loss = "loss_metrics/global_avg_loss"
    assert run[cross_entropy][0] == stock[loss][0]
    assert run[cross_entropy][2] != stock[loss][2]
    assert len(run[loss]) == 3
    for total, part, sp, cp in zip(run[loss], run[cross_entropy], run["reg/sp"], run["reg/cp"], strict=True):
        assert total == pytest.approx(part + 0.01 * sp + 0.5 * cp, rel=1e-6)


def test_trainer_stops_at_what_is_refused(tmp_path: Path) -> None:
    option = ["--override.imports", f'{ENTRY}={{"sp": 0.01}}']
    done = trained(tmp_path, *option)
    assert done.returncode != 0
    assert f"ValueError: {ENTRY}: the terms have not been tried in CUDA graphs; pass" in done.stderr


CASES: dict[str, tuple[str, dict[str, int], str]] = {
    "FSDP": ("qwen3", {}, "none"),
    "replicas": ("qwen3", {"data_parallel_replicate_degree": 2}, "selective"),
    "EP": ("qwen3", {"expert_parallel_degree": 2}, "none"),
    "EP, selective checkpointing": ("qwen3", {"expert_parallel_degree": 2}, "selective"),
    "EP, full checkpointing": ("deepseek_v3", {"expert_parallel_degree": 2}, "full"),
}
Part = tuple[Tensor, dict[str, Tensor], dict[str, float]]


def on_a_rank() -> dict[str, Part]:
    """This rank's part of a step of every case, through TorchTitan's own parallelize function."""
    prepare()
    return {name: part_of_step(*case) for name, case in CASES.items()}


def part_of_step(kind: str, degrees: dict[str, int], mode: str) -> Part:
    """Loss, gradients of all experts, and logged metrics."""
    from torchtitan.distributed import ParallelDims, utils

    from torchtitan_ext.adapters.torchtitan.record import RECORD

    config = configuration(kind)
    # The default, spmd_types, needs a newer FSDP than torch 2.13's: it stops at parameters that are no DTensors.
    config.parallelism.spmd_backend = "partial_dtensor"
    for name, degree in degrees.items():
        setattr(config.parallelism, name, degree)
    config.training.mixed_precision_param, config.training.disable_cuda_graphs = "float32", True
    dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
    utils.set_spmd_backend("partial_dtensor")
    config.model_spec.model.update_from_config(config=config)
    override(config, TERMS)
    config.metrics.build(parallel_dims=dims, config_dict=config.to_dict())

    def parallelize(model: torch.nn.Module) -> Any:
        return config.model_spec.parallelize_fn(
            model,
            parallel_dims=dims,
            training=config.training,
            parallelism=config.parallelism,
            compile_config=config.compile,
            ac_config=checkpointing(mode),
            dump_folder="",
        )

    model, loss = built(config, parallelize)
    tokens, labels = batch(4)
    rank, mine = dist.get_rank(), 4 // dist.get_world_size()
    part = slice(rank * mine, (rank + 1) * mine)
    with utils.get_spmd_context(parallel_dims=dims)():
        result = step(model, loss, tokens[part], labels[part], (labels != -100).sum())
    return result.loss, {name: whole(gradient) for name, gradient in result.gradients.items()}, RECORD.metrics()


def whole(gradient: Any) -> Tensor:
    """Of all ranks, and all experts."""
    full: Tensor = gradient.full_tensor()
    return full


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As ranks have: matrix products by two threads differ in their last bits, which experts then round to bfloat16."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Part]]:
    return launch(2, on_a_rank)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name: str, ranks: list[dict[str, Part]]) -> None:
    from torchtitan_ext.adapters.torchtitan.record import RECORD

    one = step(*built(configuration(CASES[name][0], TERMS)), *batch(4))
    metrics = RECORD.metrics()
    assert float(sum(rank[name][0] for rank in ranks)) == pytest.approx(float(one.loss), rel=1e-6)
    for rank in ranks:
        _, gradients, logged_metrics = rank[name]
        assert logged_metrics == pytest.approx(metrics, rel=1e-5)
        for parameter, gradient in one.gradients.items():
            assert gradients[parameter].shape == gradient.shape
            assert (gradients[parameter] - gradient).norm() / gradient.norm() < BFLOAT16, parameter
