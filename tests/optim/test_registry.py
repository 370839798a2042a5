"""An optimizer is one file: its options, its memory in plan, its checkpoints and its learning rate follow from
registration."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.helpers.commands import ROOT
from tests.helpers.extensions import forget_optimizers
from tests.helpers.ranks import launch
from tests.helpers.steps import DEEPSEEK, VOCABULARY, batch_of, config_of, mesh_of, rank_part
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.degrees import resolve
from titan_moe.config.describe import json_schema, options_help
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.data.prepare import prepare
from titan_moe.errors import UserError
from titan_moe.estimate.plan import memory, plan_text, sharded_model
from titan_moe.model.gemm import local
from titan_moe.optim import build_optimizer
from titan_moe.parallel.mesh import single
from titan_moe.parallel.parallelize import build_runner
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step
from titan_moe.train.trainer import Trainer

Make = Callable[..., Config]
TIMED = ("tokens_per_second", "step_seconds", "mfu", "memory_gib")


@pytest.fixture
def sgd(tmp_path: Path) -> Iterator[str]:
    """The option that loads the optimizer of docs/extending.md."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith("# my_optimizer.py"))
    (tmp_path / "my_optimizer.py").write_text(block)
    yield f"--extensions.modules={tmp_path / 'my_optimizer.py'}"
    forget_optimizers()


def train(config: Config) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without timings."""
    run_dir = RunDir(config)
    run_dir.open()
    try:
        Trainer(config, prepare(config), run_dir, single(torch.device("cpu"))).run()
    finally:
        run_dir.close()
    found = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in found]


def saved_tensors(path: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(path, path.parent / "flat.pt")
    loaded: dict[str, torch.Tensor] = torch.load(path.parent / "flat.pt", weights_only=True)
    return loaded


def test_a_file_of_the_users_is_a_whole_optimizer(sgd: str, tiny_config: Make) -> None:
    config = tiny_config(sgd, "--optimizer.name=sgd", "--optimizer.lr=0.5", "--optimizer.sgd.momentum=0.8")
    assert "--optimizer.sgd.momentum=0.9  (float, >= 0.0, < 1.0)" in options_help()
    jsonschema.validate({"optimizer": {"sgd": {"momentum": 0.5}}}, json_schema())
    own = sum(
        p.numel() for p in sharded_model(with_vocabulary(config, 512), resolve(config.parallelism, 1, str)).parameters()
    )
    assert f"{'state of sgd':<26} {4 * own / 2**20:.2f} MiB" in plan_text(config, 1)
    found = train(config)
    losses = [row["loss"] for row in found if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert [row["lr"] for row in found if row["kind"] == "train"][:2] == [0.25, 0.5]  # two steps of warm-up
    assert load_config(str(RunDir(config).path / "config.toml")) == config
    assert (
        train(tiny_config(sgd, "--optimizer.name=sgd", "--optimizer.lr=0.5", "--optimizer.sgd.momentum=0.8")) == found
    )


def test_mistakes(sgd: str) -> None:
    with pytest.raises(UserError, match=r"command line: optimizer\.sgd\.momentum = 1\.5"):
        load_config("debug", [sgd, "--optimizer.sgd.momentum=1.5"])
    with pytest.raises(
        UserError, match=r"unknown key optimizer\.sgd\.momentun; did you mean optimizer\.sgd\.momentum\?"
    ):
        load_config("debug", [sgd, "--optimizer.sgd.momentun=0.5"])
    with pytest.raises(
        UserError, match=r"command line: optimizer\.name: no optimizer 'adam'; there are adamw, muon, sgd"
    ):
        load_config("debug", [sgd, "--optimizer.name=adam"])


def test_options_of_another_optimizer_may_change_on_resuming(tiny_config: Make) -> None:
    train(tiny_config("--training.steps=2"))
    train(tiny_config("--training.steps=3", "--optimizer.muon.momentum=0.5", "--optimizer.lr=1e-4"))


def test_of_muon_the_learning_rate_alone_may_change_on_resuming(tiny_config: Make) -> None:
    train(tiny_config("--training.steps=2", "--optimizer.name=muon"))
    train(tiny_config("--training.steps=3", "--optimizer.name=muon", "--optimizer.muon.lr=1e-4"))
    for change in ("--optimizer.muon.momentum=0.5", "--optimizer.name=adamw"):
        with pytest.raises(UserError, match=change[2:].partition("=")[0].replace(".", r"\.")):
            train(tiny_config("--training.steps=4", "--optimizer.name=muon", "--optimizer.muon.lr=1e-4", change))


@pytest.mark.parametrize("background", ["false", "true"])
def test_muon_resumes_bitwise(tiny_config: Make, background: str) -> None:
    options = ["--optimizer.name=muon", "--training.steps=4", "--checkpoint.interval=1", *DEEPSEEK[:3]]
    options += ["--training.dtype=float32", f"--checkpoint.async_save={background}"]
    whole = tiny_config("--job.name=whole", *options)
    wanted = train(whole)
    for step in (1, 3):
        config = tiny_config(f"--job.name=from-{step}", *options)
        target, source = RunDir(config), RunDir(whole)
        target.open()
        target.close()
        shutil.copytree(source.checkpoint(step), target.checkpoint(step))
        shutil.copy(source.metrics, target.metrics)
        assert train(config) == wanted
        final, again = (saved_tensors(run.checkpoint(4)) for run in (source, target))
        assert "optimizer.layers.1.moe.experts.gate_up.momentum_buffer" in final
        assert "optimizer.embedding.exp_avg_sq" in final
        assert final.keys() == again.keys()
        assert all(torch.equal(final[name], again[name]) for name in final)


def with_vocabulary(config: Config, size: int) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def planned(words: list[str], world: int) -> int:
    config = with_vocabulary(config_of(words, world), VOCABULARY)
    degrees = resolve(config.parallelism, world, str)
    return memory(sharded_model(config, degrees), config, degrees)["state of muon"]


def kept(words: list[str], world: int) -> int:
    """Bytes of optimizer state of this rank after a step, without AdamW's step counters."""
    config = config_of(words, world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    runner = build_runner(model, config, mesh)
    train_step(runner, optimizer, rank_part(batch_of(1), config, mesh), config, mesh, 1, {})
    tensors = [local(x) for state in optimizer.state.values() for kind, x in state.items() if kind != "step"]
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "degrees"), [(1, []), (2, ["--parallelism.ep=2"]), (2, ["--parallelism.tp=2"])], ids=str
)
def test_planned_state_of_muon_is_the_kept_one(world: int, degrees: list[str]) -> None:
    words = [*DEEPSEEK, *degrees, "--optimizer.name=muon"]
    (expected,) = launch(1, planned, words, world, group=False)
    assert launch(world, kept, words, world)[0] == expected
