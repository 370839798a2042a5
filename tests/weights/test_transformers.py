"""Transformers computes from an export what our model computes from the checkpoint."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.random_runs import (
    VARIANTS,
    WITHOUT_GGUF,
    greedy,
    logits,
    random_model,
    settings,
    tokens,
    write_run,
)
from tests.helpers.strangers import verb
from titan_moe.weights.architectures import ARCHITECTURES, fitting
from titan_moe.weights.entries import Entry
from titan_moe.weights.names import layer_entries, outer_entries

transformers = pytest.importorskip("transformers")

ALL = VARIANTS | WITHOUT_GGUF


def export(network: Any, folder: Path, *words: str, dtype: str = "float32") -> Path:
    """The exported directory of a run with this network."""
    assert verb("export", str(write_run(folder, network, dtype)), "--output", str(folder / "export"), *words) == 0
    return folder / "export"


def load(folder: Path, **options: Any) -> Any:
    """The model that Transformers makes of a directory, with every tensor from its files and none left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, local_files_only=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def entries(name: str, model: Any) -> list[Entry]:
    names = ARCHITECTURES[name].names
    layers = (entry for layer in range(model.layers) for entry in layer_entries(names, model, layer))
    return [*outer_entries(names, model), *layers]


@pytest.mark.parametrize("variant", ALL)
def test_logits_and_greedy_text_of_transformers_are_ours(variant: str, tmp_path: Path) -> None:
    """float32 sums of some hundred numbers in another order; logits are up to 6, and 1e-5 is 20 roundings of that."""
    options, biased = ALL[variant]
    network = random_model(settings(options), biased)
    folder = export(network, tmp_path)
    model = load(folder)
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert (model(tokens()).logits - logits(network, tokens())).abs().max() < 1e-5
    check_parameters(model, network)
    prompt = tokens(1, 8)
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50, do_sample=False, eos_token_id=None
    )
    assert generated[0, 8:].tolist() == greedy(network, prompt[0].tolist(), 50)


def check_parameters(model: Any, network: Any) -> None:
    """The parameters that Transformers has in memory are bitwise ours; it keeps the experts of a layer in two tensors."""
    ours, loaded, seen = network.state_dict(), model.state_dict(), set()
    for entry in entries(model.config.model_type, network.settings):
        name = entry.name.replace("block_sparse_moe", "mlp").replace("mlp.moe_statics", "mlp.gate.moe_statics")
        part: Any = slice(None)
        of_expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if of_expert:
            kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(of_expert[3], of_expert[3])
            hidden = network.settings.moe.hidden_dim
            half = {"gate_proj": slice(hidden), "up_proj": slice(hidden, None)}.get(kind)
            name = f"{of_expert[1]}.{'gate_up_proj' if half else 'down_proj'}"
            part = (int(of_expert[2]), half or slice(None))
        assert torch.equal(loaded[name][part], entry.to_file(ours)), name
        seen.add(name)
    tied = {"lm_head.weight"} if network.settings.tie_embeddings else set()
    assert loaded.keys() - tied == seen - tied


@pytest.mark.parametrize("variant", ALL)
def test_every_tensor_of_ours_is_in_the_files_bit_by_bit_and_goes_back(variant: str, tmp_path: Path) -> None:
    """Except experts' down projections with a factor that is no power of two, which may be off by a rounding."""
    from safetensors.torch import load_file

    options, biased = ALL[variant]
    network = random_model(settings(options), biased)
    ours = network.state_dict()
    folder = export(network, tmp_path)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == network.settings.layers + 2
    stored = {name: value for file in files for name, value in load_file(file).items()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
    architecture = json.loads((folder / "config.json").read_text())["model_type"]
    back = {name: torch.full_like(value, torch.nan) for name, value in ours.items()}
    for entry in entries(architecture, network.settings):
        value = stored.pop(entry.name)
        assert value.shape == entry.shape
        assert torch.equal(value, entry.to_file(ours))
        if entry.ours:
            entry.into_ours(value, back)
    assert not stored
    scaled = network.settings.moe.route_scale != 1.0
    for name, value in ours.items():
        if name.endswith("expert_bias") and not ARCHITECTURES[architecture].names.balancing_bias:
            assert not value.any()
        elif name.endswith("experts.down") and scaled and architecture != "glm4_moe":
            torch.testing.assert_close(back[name], value, rtol=2**-23, atol=0)
        else:
            assert torch.equal(back[name], value), name


def test_every_architecture_is_tested() -> None:
    chosen = {fitting(settings(options), biased).model_type for options, biased in ALL.values()}
    assert chosen == set(ARCHITECTURES)


@pytest.mark.parametrize("variant", ["softmax", "renormalised, dense", "qk_norm, shared", "sigmoid, biased, qk_norm"])
def test_bfloat16_of_transformers_differs_from_ours_by_two_roundings(variant: str, tmp_path: Path) -> None:
    """Ours in bfloat16 is off float32 by its roundings. Transformers rounds in other places, and the difference of two
    independent roundings is sqrt(2) times one. The median, since now and then another expert is chosen."""
    options, biased = VARIANTS[variant]
    network = random_model(settings(options), biased)
    model = load(export(network, tmp_path, dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    ids = tokens(8, 60)
    ours = logits(random_model(settings(options), biased, torch.bfloat16), ids).float()
    with torch.no_grad():
        theirs = model(ids).logits.float()
    rounding = (ours - logits(network, ids)).abs().median()
    assert 0 < (theirs - ours).abs().median() < 2**0.5 * rounding


def test_router_and_balancing_bias_stay_float32_where_transformers_keeps_them_so(tmp_path: Path) -> None:
    options, biased = VARIANTS["sigmoid, biased, qk_norm"]
    network = random_model(settings(options), biased)
    model = load(export(network, tmp_path, "--dtype", "bfloat16"))
    for block, ours in zip(model.model.layers, network.moe_modules(), strict=True):
        assert torch.equal(block.mlp.gate.weight, ours.router.weight)
        assert torch.equal(block.mlp.gate.e_score_correction_bias, ours.router.expert_bias)
        assert torch.equal(block.mlp.experts.down_proj, ours.experts.down.to(torch.bfloat16))
