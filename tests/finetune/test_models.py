"""The models that are fine-tuned: which parameters get adapters, and DeepSeek-MoE-16B's way to Transformers."""

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from scripts.make_tiny_model import SIZES
from tests.helpers.other_models import save_deepseek
from tests.helpers.tiny_models import model, tokenizer
from titan_moe.errors import UserError
from titan_moe.finetune.model import load_model, load_tokenizer, lora_config
from titan_moe.finetune.tables import Data, FinetuneConfig, Lora, Model
from titan_moe.weights.import_folder import import_folder
from titan_moe.weights.source import open_source
from titan_moe.weights.transformers_folder import export_folder
from torchtitan_ext.adapters.transformers import attach

IDS = torch.arange(20, 44).view(2, 12)


def trained(network: Any, lora: Lora) -> dict[str, torch.nn.Parameter]:
    """The adapters' parameters by the name of what they are on, and by their place there."""
    wrapped = peft.get_peft_model(network, lora_config(network, lora))
    return {name: value for name, value in wrapped.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("kind", SIZES)
def test_adapters_are_on_every_part_and_start_at_nothing(kind: str) -> None:
    """Attention, dense and shared layers, experts and routers of each architecture get adapters, which change nothing at first;
    all get a gradient."""
    network = model(kind)
    with torch.no_grad():
        before = copy.deepcopy(network)(input_ids=IDS).logits
    wrapped = peft.get_peft_model(network, lora_config(network, Lora(rank=2)))
    found = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    parts = {"self_attn", "experts", "gate"} | ({"shared"} if kind != "qwen3_moe" else set())
    assert all(any(re.search(rf"\.{part}", name) for name in found) for part in parts)
    if kind != "qwen3_moe":  # a dense layer comes first
        assert any(re.search(r"layers\.0\.mlp\.(gate|up|down)_proj", name) for name in found)
    logits = wrapped(input_ids=IDS).logits
    assert torch.equal(logits, before)
    with torch.no_grad():
        for name, value in found.items():
            if "lora_B" in name:
                value.normal_(0, 0.05)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    assert not [name for name, value in found.items() if value.grad is None or not value.grad.abs().max() > 0]


def test_parts_can_be_left_out() -> None:
    only = {"attention": False, "feed_forward": False, "experts": False, "router": False}
    for part, pattern in (("attention", "self_attn"), ("experts", r"mlp\.experts"), ("router", r"mlp\.gate\.")):
        names = trained(model(), Lora(rank=2, **(only | {part: True})))
        assert names
        assert all(re.search(pattern, name) for name in names)


def configured(path: Path, **options: Any) -> FinetuneConfig:
    return FinetuneConfig(model=Model(path=str(path), dtype="float32"), data=Data(**options))


def test_deepseek_moe_by_import_and_export(tmp_path: Path) -> None:
    """A model of the architecture that Transformers lacks loads after import and export, takes terms and adapters."""
    save_deepseek(tmp_path / "deepseek")
    import_folder(tmp_path / "deepseek", tmp_path / "ours", "")
    export_folder(open_source(tmp_path / "ours", 0), tmp_path / "hf", "float32")
    network = load_model(configured(tmp_path / "hf"))
    assert network.config.model_type == "qwen2_moe"
    attached = attach(network, {"sp": 0.1, "cp": 0.1})
    wrapped = peft.get_peft_model(network, lora_config(network, Lora(rank=2)))
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    assert attached.metrics()["reg/sp"] > 0
    assert load_tokenizer(configured(tmp_path / "hf")).eos_token


def saved(folder: Path, kind: str = "qwen3_moe") -> Path:
    model(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_directories_that_can_not_be_loaded(tmp_path: Path) -> None:
    """One line each, and never a model with random numbers in place of what is missing."""
    folder = saved(tmp_path / "model")
    config = (folder / "config.json").read_text()
    weights = (folder / "model.safetensors").read_bytes()
    cases = [
        (config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'), weights, "missing keys in its files"),
        (config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'), weights, "unexpected keys in its files"),
        (config.replace('"qwen3_moe"', '"qwen9_moe"'), weights, "qwen9_moe"),
        (config, weights[: len(weights) // 2], "model.path"),
    ]
    for text, data, message in cases:
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(UserError, match=message) as found:
            load_model(configured(folder))
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match=r"no such directory, and no name of a model on the hub"):
        load_model(configured(tmp_path / "nowhere"))


def test_a_chat_template_of_a_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}")
    chosen = load_tokenizer(configured(folder, chat_template=str(tmp_path / "template.jinja")))
    assert chosen.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    with pytest.raises(UserError, match=r"data\.chat_template = '.*none': can't be read"):
        load_tokenizer(configured(folder, chat_template=str(tmp_path / "none")))
