"""A run on C4 from before it was tokenised while training: its cache has all shards, and it goes on with them."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import TINY
from tests.helpers.hub import make_c4
from tests.helpers.runs import rows, saved_tensors, train, untimed
from tests.helpers.strangers import edit_state
from titan_moe.checkpoint.prepared import prepare_run
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.data.shards import SPLITS
from titan_moe.errors import UserError

pytest.importorskip("datasets")
pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    make_c4(tmp_path, 800)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = ["--data.corpus=c4", f"--data.cache_dir={tmp_path / 'cache'}", f"--job.output_dir={tmp_path / 'runs'}"]
    return load_config("debug", [*TINY, "--tokenizer.vocab_size=400", *places])


@pytest.fixture
def old(config: Config) -> RunDir:
    """A run of six steps, of which the checkpoint after the second is left. All of C4 was tokenised before it, by the code for
    every other corpus; its state has no options of streaming."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_moe.data.prepare.is_streamed", lambda _: False)
        train(config)
    run_dir = RunDir(config)
    for step in (4, 6):
        shutil.copytree(run_dir.checkpoint(step), run_dir.path / "whole" / str(step))
        shutil.rmtree(run_dir.checkpoint(step))
    edit_state(run_dir.path, lambda state: state["config"]["data"].pop("shuffle_tokens"))
    lines = (run_dir.path / "config.toml").read_text().splitlines(keepends=True)
    (run_dir.path / "config.toml").write_text("".join(line for line in lines if "shuffle_tokens" not in line))
    return run_dir


def test_a_run_on_old_shards_goes_on_bitwise(config: Config, old: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """Rows and tensors are those of the run that was not interrupted: the same text in the same order."""
    wanted = untimed(rows(old))
    with caplog.at_level(logging.WARNING, "titan_moe"):
        prepared = prepare_run(config, RunDir(config))
        assert prepared.manifest.stream is None
        assert {*prepared.manifest.splits} == {*SPLITS}
        assert any("was tokenised before it was streamed; going on" in one.message for one in caplog.records)
        found = untimed(train(config))
    assert found == wanted
    for step in (4, 6):
        before, after = saved_tensors(old.path / "whole" / str(step)), saved_tensors(old.checkpoint(step))
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_without_its_shards_it_is_refused_in_one_line_or_takes_the_stream_when_told_to(
    config: Config, old: RunDir, tmp_path: Path
) -> None:
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"checkpoint\.allow_new_data=true") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    allowed = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"allow_new_data": True})})
    assert train(allowed)[-1]["step"] == 6
    assert prepare_run(allowed, RunDir(allowed)).manifest.stream
    assert old.saved_steps() == [2, 4, 6]
