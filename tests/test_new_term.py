"""A loss term of a user's own, in one file, has all that a built-in one has. The file is the guide's
(docs/extending.md)."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import ROOT, TINY
from tests.helpers.ranks import launch
from tests.helpers.runs import train
from tests.helpers.steps import train as train_steps
from titan_moe.analysis.report.report import write_report
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.describe import json_schema, options_help
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.estimate.plan import plan_text
from torchtitan_ext.terms import REGISTRY

Make = Callable[..., Config]
WEIGHT = "--regularizers.drift.weight=0.01"


@pytest.fixture
def module(tmp_path: Path) -> Iterator[str]:
    """The option that loads the term; the registry is restored afterwards."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith("# my_drift.py"))
    (tmp_path / "my_drift.py").write_text(block)
    before = dict(REGISTRY)
    yield f"--extensions.modules={tmp_path / 'my_drift.py'}"
    REGISTRY.clear()
    REGISTRY.update(before)


def test_its_options_are_in_help_and_schema_and_are_checked(tiny_config: Make, module: str) -> None:
    tiny_config(module)
    assert "--regularizers.drift.power=2.0" in options_help()
    assert "Exponent of the absolute difference." in options_help()
    assert "drift" in json.dumps(json_schema())
    with pytest.raises(UserError, match=r"regularizers\.drift\.power = 0\.0: input should be greater than 0"):
        tiny_config(module, "--regularizers.drift.power=0")
    with pytest.raises(
        UserError, match=r"unknown key regularizers\.drift\.powr; did you mean regularizers\.drift\.power"
    ):
        tiny_config(module, "--regularizers.drift.powr=1")


def test_it_is_in_metrics_and_report_warms_up_and_changes_the_model(tiny_config: Make, module: str) -> None:
    config = tiny_config(module, WEIGHT, "--job.name=on")
    on = train(config)
    off = train(tiny_config(module, "--regularizers.measure=drift", "--job.name=off"))
    slow = train(tiny_config(module, WEIGHT, "--regularizers.drift.warmup_steps=1000", "--job.name=slow"))
    first = [next(row for row in rows if row["kind"] == "train") for rows in (on, off, slow)]
    assert first[0]["reg/drift"] == first[1]["reg/drift"] == first[2]["reg/drift"] > 0
    assert first[0]["loss"] - first[1]["loss"] == pytest.approx(0.01 * first[0]["reg/drift"], rel=1e-3)
    assert first[2]["loss"] - first[1]["loss"] == pytest.approx(1e-5 * first[0]["reg/drift"], abs=1e-6)
    assert on[-1]["loss"] != off[-1]["loss"]
    page = write_report([RunDir(config).path], RunDir(config).path / "report")
    assert "drift" in page.read_text()


def plan_of(words: list[str], world: int) -> str:
    return plan_text(load_config("debug", words, world_size=world), world)


def test_plan_counts_the_activations_that_it_asks_for(module: str) -> None:
    words = [*TINY, module, WEIGHT, "--parallelism.ep=2", "--training.dtype=float32"]
    (with_term,) = launch(1, plan_of, words, 2, group=False)  # in a process of its own: it makes a fake process group
    assert "all-to-all, activations for terms" in with_term
    # 2 sequences of 32 tokens on each of 2 ranks, 2 experts each, 24 hidden units, float32, 3 layers, there and back
    size = 2 * 32 * 2 * 24 * 4 * 3 * 2
    (line,) = (line for line in with_term.splitlines() if "activations for terms" in line)
    assert f"{size / 2**20:.2f} MiB" in line


@pytest.mark.parametrize("power", [2.0, 3.0])
def test_two_ranks_with_expert_parallelism_equal_one(module: str, power: float) -> None:
    """Float64 sums in another order: 1e-9 is far above their rounding, as in tests/distributed/test_layouts.py."""
    words = [module, WEIGHT, f"--regularizers.drift.power={power}", "--regularizers.lb.scope=sequence"]
    wanted = train_steps(words, 1, 3)
    for found in launch(2, train_steps, [*words, "--parallelism.ep=2"], 2, 3):
        for row, other in zip(found.rows, wanted.rows, strict=True):
            assert row == pytest.approx(other, rel=1e-9)
        for name, value in found.parameters.items():
            torch.testing.assert_close(value, wanted.parameters[name], rtol=1e-9, atol=1e-12, msg=name)
