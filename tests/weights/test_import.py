"""Our model computes from an import what Transformers computes from the same files, and an export gives them back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.other_models import MODELS, save, save_deepseek
from tests.helpers.random_runs import logits, tokens
from tests.helpers.strangers import verb
from titan_moe.checkpoint.dcp import load_checkpoint
from titan_moe.config.load import load_config
from titan_moe.model.transformer import Transformer
from titan_moe.weights.import_config import READERS
from torchtitan_ext.terms import Terms

pytest.importorskip("transformers")


def imported(folder: Path) -> Transformer:
    """The model of an imported directory, built from its config.toml."""
    model = Transformer(load_config(str(folder / "config.toml")).model, Terms(), torch.float32)
    load_checkpoint(folder / "checkpoints" / "step-00000000", model, None)
    return model


def check_logits(theirs: Any, ours: Transformer) -> None:
    """float32 sums of some hundred numbers in another order; logits are up to 6, and 1e-5 is 20 roundings of that."""
    with torch.no_grad():
        wanted = theirs(tokens()).logits
    assert wanted.abs().max() > 1
    assert (logits(ours, tokens()) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", [False, True], ids=["single", "shards"])
def test_logits_are_those_of_transformers(name: str, shards: bool, tmp_path: Path) -> None:
    theirs = save(name, tmp_path / "theirs", max_shard_size="60KB" if shards else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == shards
    assert verb("import", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")) == 0
    check_logits(theirs, imported(tmp_path / "ours"))


def test_the_layout_of_deepseek_moe_is_read_without_its_code(tmp_path: Path) -> None:
    theirs = save_deepseek(tmp_path / "theirs")
    assert verb("import", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")) == 0
    check_logits(theirs, imported(tmp_path / "ours"))


def test_every_architecture_is_tested() -> None:
    assert {kind for kind, _ in MODELS.values()} | {"deepseek"} == set(READERS)


@pytest.mark.parametrize(
    "name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "glm4_moe-qk_norm", "ernie4_5_moe"]
)
def test_an_export_of_the_import_has_the_same_tensors_bit_by_bit(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save(name, tmp_path / "theirs")
    verb("import", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours"))
    assert verb("export", str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--dtype", "float32") == 0
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after: dict[str, Any] = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for label, value in before.items():
        assert torch.equal(value, after[label]), label
    old, new = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("theirs", "back"))
    assert old["model_type"] == new["model_type"]
