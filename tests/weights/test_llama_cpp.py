"""llama.cpp computes from a GGUF file what our model computes from the checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.random_runs import (
    VARIANTS,
    VOCABULARY,
    WITHOUT_ARCHITECTURE,
    greedy,
    logits,
    random_model,
    settings,
    tokens,
    write_run,
)
from tests.helpers.strangers import verb
from tests.helpers.texts import texts
from tests.helpers.tokenizer_kinds import KINDS
from titan_moe.config.tables import Model
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.weights.entries import Entry
from titan_moe.weights.gguf_names import block_entries, first_entries, last_entries

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("tests.helpers.llama_cpp")

ALL = VARIANTS | WITHOUT_ARCHITECTURE


def export(network: Any, folder: Path, *words: str, pieces: Tokenizer | None = None) -> Path:
    """The exported file of a run with this network."""
    run, out = write_run(folder, network, pieces=pieces), folder / "model.gguf"
    assert verb("export", str(run), "--format", "gguf", "--output", str(out), *words) == 0
    return out


def entries(model: Model) -> list[Entry]:
    blocks = (entry for layer in range(model.layers) for entry in block_entries(model, layer))
    return [*first_entries(model), *blocks, *last_entries(model)]


def log_probabilities(network: Any, ids: list[int]) -> Tensor:
    return logits(network, torch.tensor([ids]))[0, -1].log_softmax(-1)


def everything(served: Any, ids: list[int]) -> Tensor:
    """llama.cpp's log-probabilities of all tokens after `ids`."""
    found = served.log_probabilities(ids, VOCABULARY)
    assert len(found) == VOCABULARY
    return torch.tensor([found[i] for i in range(VOCABULARY)])


@pytest.mark.parametrize("variant", ALL)
def test_log_probabilities_and_greedy_text_of_llama_cpp_are_ours(variant: str, tmp_path: Path) -> None:
    """f32, all of the vocabulary, after texts of three lengths. 1e-5: as for Transformers."""
    options, biased = ALL[variant]
    network = random_model(settings(options), biased)
    served = llama_cpp.LlamaCpp(export(network, tmp_path, "--dtype", "f32"), 128)
    ids = tokens(1, 60)[0].tolist()
    for length in (1, 17, 60):
        theirs = everything(served, ids[:length])
        assert (theirs - log_probabilities(network, ids[:length])).abs().max() < 1e-5
    assert served.greedy(ids[:8], 50) == greedy(network, ids[:8], 50)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_thousand_texts_are_ours(kind: str, tmp_path: Path) -> None:
    """The names of control symbols are letters where llama.cpp is asked for that, and symbols otherwise. The embedding has
    rows beyond the pieces, which must have names too."""
    ours = KINDS[kind]()
    network = random_model(settings({"vocab_size": ours.vocab_size + 5}), biased=False)
    served = llama_cpp.LlamaCpp(export(network, tmp_path, pieces=ours), 64)
    given = texts()
    assert not [text for text in given if served.tokenize(text, special=False) != ours.encode(text)]
    text = "a </s> b"
    assert served.tokenize(text, special=False) == ours.encode(text)
    assert served.tokenize(text, special=True).count(ours.eos) == 1


TOLERANCES = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-11}
"""Largest rounding as a share of the number itself, and for q8_0 as a share of the largest of 32 numbers (half of 1/127, and
the rounding of the scale to f16)."""


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_weights_of_smaller_types_are_rounded_ones(dtype: str, tmp_path: Path) -> None:
    """Rows of 32 and 64 numbers; with head_dim 20 those of attn_output have 80, which is no multiple of q8_0's blocks."""
    network = random_model(settings({"score": "sigmoid", "shared_experts": 1, "head_dim": 20}), biased=True)
    reader = gguf.GGUFReader(export(network, tmp_path, "--dtype", dtype))
    ours = network.state_dict()
    assert json.loads(reader.fields["titan_moe.model"].contents()) == network.settings.model_dump(mode="json")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    exact = {name for name, tensor in stored.items() if tensor.tensor_type.name == "F32"}
    kinds = ("norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")
    assert exact == {name for name in stored if name.endswith(kinds)}
    f16 = {name for name, tensor in stored.items() if tensor.tensor_type.name == "F16"}
    if dtype == "q8_0":
        assert f16 == {f"blk.{layer}.attn_output.weight" for layer in range(3)}
    pairs = {
        "token_embd.weight": ours["embedding"],
        "output_norm.weight": ours["norm.weight"],
        "blk.1.ffn_gate_inp.weight": ours["layers.1.moe.router.weight"],
        "blk.1.exp_probs_b.bias": ours["layers.1.moe.router.expert_bias"],
        "blk.2.ffn_gate_exps.weight": ours["layers.2.moe.experts.gate_up"][:, 0],
        "blk.2.ffn_up_exps.weight": ours["layers.2.moe.experts.gate_up"][:, 1],
        "blk.2.ffn_down_exps.weight": ours["layers.2.moe.experts.down"],
        "blk.2.ffn_down_shexp.weight": ours["layers.2.moe.shared.down.weight"],
        "blk.0.attn_output.weight": ours["layers.0.attention.wo.weight"],
    }
    for name, value in pairs.items():
        found = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).reshape(value.shape)
        wanted = value.numpy()
        if name in exact:
            assert np.array_equal(found, wanted)
            continue
        scale = np.abs(wanted)
        if stored[name].tensor_type.name == "Q8_0":
            blocks = scale.reshape(-1, 32).max(axis=1, keepdims=True)
            scale = np.broadcast_to(blocks, (blocks.shape[0], 32)).reshape(wanted.shape)
        share = TOLERANCES["f16" if name in f16 else dtype]
        assert (np.abs(found - wanted) <= share * scale + 2**-24).all()  # 2^-24: the smallest f16
        assert not np.array_equal(found, wanted)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_llama_cpp_with_smaller_types_is_about_as_far_as_their_rounding(dtype: str, tmp_path: Path) -> None:
    """The file's weights go back into our model: what their rounding alone changes, on average over the vocabulary. llama.cpp
    also rounds the activations to that type, which is as much again; twice the sum is allowed."""
    network = random_model(settings({"score": "sigmoid", "shared_experts": 1, "normalize_topk": True}), biased=True)
    out = export(network, tmp_path, "--dtype", dtype)
    ids = tokens(1, 32)[0].tolist()
    exact = log_probabilities(network, ids)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    back = network.state_dict()
    for entry in entries(network.settings):
        if entry.ours:
            tensor = stored[entry.name]
            value = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
            entry.into_ours(value.reshape(entry.shape), back)
    rounding = (log_probabilities(network, ids) - exact).abs().mean()
    served = llama_cpp.LlamaCpp(out, 64)
    distance = (everything(served, ids) - exact).abs().mean()
    assert 0 < distance < 4 * rounding
