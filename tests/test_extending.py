"""The examples of docs/extending.md, run as they stand there."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.runs import train
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config import extensions
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from torchtitan_ext.terms import REGISTRY

Make = Callable[..., Config]


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A directory with the guide's Python files."""
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block)
    return tmp_path


@pytest.fixture(autouse=True)
def _forget_extensions() -> Iterator[None]:
    before = dict(REGISTRY)
    yield
    for table in (REGISTRY, extensions.corpora, extensions.trackers):
        table.clear()
    REGISTRY.update(before)


def test_term(tiny_config: Make, examples: Path) -> None:
    module = f"--extensions.modules={examples / 'my_term.py'}"
    weighted = train(tiny_config("--job.name=weighted", module, "--regularizers.entropy.weight=1e-2"))
    row = next(r for r in weighted if r["kind"] == "train")
    # Summed over layers it is three times the mean that moe/entropy reports.
    assert row["reg/entropy"] == pytest.approx(3 * row["moe/entropy"], rel=1e-5)
    measured = train(tiny_config("--job.name=measured", module, "--regularizers.measure=entropy"))
    assert measured[1]["reg/entropy"] == row["reg/entropy"]
    assert measured[2]["reg/entropy"] != weighted[2]["reg/entropy"]  # only a weight changes the model


def test_corpus(tiny_config: Make, examples: Path) -> None:
    module = f"--extensions.modules={examples / 'my_corpus.py'}"
    found = train(tiny_config(module, "--data.corpus=manual"))
    assert found[-1]["kind"] == "validation"


def test_tracker(tiny_config: Make, examples: Path) -> None:
    config = tiny_config(f"--extensions.modules={examples / 'my_tracker.py'}", "--metrics.trackers=csv")
    found = train(config)
    lines = (RunDir(config).path / "losses.csv").read_text().splitlines()
    losses = {r["step"]: r["loss"] for r in found if r["kind"] == "train"}
    assert lines == [f"{step},{loss}" for step, loss in losses.items()]


def test_a_module_that_fails_is_the_users_mistake(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('no')\n")
    with pytest.raises(UserError, match=r"broken\.py' can't be imported: ValueError: no"):
        tiny_config(f"--extensions.modules={tmp_path / 'broken.py'}")
    with pytest.raises(UserError, match=r"missing\.py' can't be imported"):
        tiny_config("--extensions.modules=missing.py")
