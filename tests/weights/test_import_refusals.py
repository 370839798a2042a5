"""`titan-moe import` of what can't be imported: one line that says what to do, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import titan_moe
from tests.helpers.other_models import save
from tests.helpers.strangers import verb
from titan_moe.errors import UserError

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe in several files, which no test changes."""
    folder = tmp_path_factory.mktemp("theirs")
    save("qwen3_moe", folder, max_shard_size="60KB")
    return folder


def edit(folder: Path, **values: Any) -> None:
    """Changes keys of config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def change(folder: Path, alter: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of all files, which become one."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("model-*.safetensors"):
        tensors |= safetensors.load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    alter(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


def truncate(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-1])


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def remote_code(folder: Path) -> None:
    (folder / "modeling_mine.py").write_text("raise AssertionError('this code must not run')\n")
    edit(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})


def outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = "../other.safetensors"
    path.write_text(json.dumps(index))


def in_float8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = tensors[NORM].to(torch.float8_e4m3fn)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown architecture": (
        lambda f: edit(f, model_type="bloom"),
        r"model_type = 'bloom': no such architecture.*mixtral",
    ),
    "no architecture": (lambda f: edit(f, model_type=None), r"model_type = 'None'"),
    "remote code": (remote_code, r"code in its directory \(auto_map\), which is never run"),
    "truncated": (truncate, r"model-00001.*incomplete"),
    "missing file": (lambda f: first_shard(f).unlink(), r"model-00001.*is missing; download the model again"),
    "stale single file": (
        lambda f: shutil.copy(first_shard(f), f / "model.safetensors"),
        r"both model\.safetensors and model\.safetensors\.index\.json",
    ),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), r"but no model\.safetensors\.index\.json"),
    "more layers than files": (lambda f: edit(f, num_hidden_layers=4), r"config\.json says 4 layers.*the files have 3"),
    "fewer layers than files": (
        lambda f: edit(f, num_hidden_layers=2),
        r"config\.json says 2 layers.*the files have 3",
    ),
    "more experts than files": (lambda f: edit(f, num_local_experts=9), r"experts\.8\.gate_proj\.weight is missing"),
    "fewer experts than files": (
        lambda f: edit(f, num_local_experts=7),
        r"experts\.7\..* is no tensor of the architecture",
    ),
    "a billion experts": (
        lambda f: edit(
            f, num_local_experts=2**30, hidden_size=2, head_dim=24, moe_intermediate_size=1, mlp_only_layers=[]
        ),
        r"config\.json says 1073741824 experts in 3 layers, but the files have",
    ),
    "only pickled weights": (only_pickles, r"only pickled weights \(pytorch_model\.bin\)"),
    "file of another directory": (outside, r"names '\.\./other\.safetensors', which is no safetensors file"),
    "missing tensor": (lambda f: change(f, lambda t: t.pop(NORM)), rf"{NORM} is missing in its files"),
    "unexpected tensor": (
        lambda f: change(f, lambda t: t.update({"model.layers.0.extra": torch.zeros(1)})),
        r"model\.layers\.0\.extra is no tensor of the architecture",
    ),
    "other shape": (
        lambda f: edit(f, hidden_size=32),
        r"has the shape \(400, 64\); by config\.json it must be \(400, 32\)",
    ),
    "float8": (lambda f: change(f, in_float8), r"is of type F8_E4M3; only"),
    "quantised": (lambda f: edit(f, quantization_config={"bits": 4}), r"quantization_config = .*can't compute"),
    "window": (
        lambda f: edit(f, use_sliding_window=True, sliding_window=8),
        r"sliding_window = 8: our model attends to the whole text",
    ),
    "long-text rotary": (
        lambda f: edit(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        r"rope_type = 'yarn': only plain rotary embeddings",
    ),
    "dense layers in between": (
        lambda f: edit(f, mlp_only_layers=[1]),
        r"mlp_only_layers = \[1\]: only the first layers",
    ),
    "attention biases": (
        lambda f: edit(f, attention_bias=True),
        r"attention_bias = True: our model can't compute that",
    ),
    "other activation": (lambda f: edit(f, hidden_act="gelu"), r"hidden_act = gelu: .*only silu"),
    "wrong type": (lambda f: edit(f, hidden_size="64"), r"hidden_size = 64: must be a value of type int"),
    "negative": (lambda f: edit(f, num_hidden_layers=-3), r"num_hidden_layers = -3: must be a natural number"),
    "no layers": (lambda f: edit(f, num_hidden_layers=None), r"has no key 'num_hidden_layers'"),
    "zero heads": (lambda f: edit(f, num_attention_heads=0), r"config\.json: model\.heads: input should be greater"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: is no JSON"),
    "no tokenizer": (
        lambda f: (f / "tokenizer.model").unlink(),
        r"neither tokenizer\.model nor tokenizer\.json; name .*--tokenizer",
    ),
    "no sentencepiece": (lambda f: (f / "tokenizer.model").write_bytes(b"rank 1"), r"not a sentencepiece model"),
    "small vocabulary": (
        lambda f: [
            edit(f, vocab_size=300),
            change(f, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(300, 64)})),
        ],
        r"its tokenizer has 400 pieces, and config\.json says vocab_size = 300",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_one_line_and_leaves_nothing(name: str, source: Path, tmp_path: Path) -> None:
    copy, (damage, message) = tmp_path / "theirs", BROKEN[name]
    shutil.copytree(source, copy)
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        verb("import", str(copy), "--output", str(tmp_path / "ours"))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [copy]


def test_a_file_that_is_cut_while_it_is_read_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from titan_moe.weights.shards import Shards

    read = Shards.read

    def fails(self: Shards, name: str) -> torch.Tensor:
        if name == NORM:
            raise UserError(f"{name}: can't be read")
        return read(self, name)

    monkeypatch.setattr(Shards, "read", fails)
    with pytest.raises(UserError, match=NORM):
        verb("import", str(source), "--output", str(tmp_path / "ours"))
    assert not list(tmp_path.iterdir())


def test_the_command_line(source: Path, tmp_path: Path) -> None:
    """Exit status 2 and one line; an output directory that has something in it is kept as it is."""
    absent = titan_moe("import", str(tmp_path / "absent"))
    assert (absent.returncode, absent.stderr.count("\n")) == (2, 1)
    assert "no such directory" in absent.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    full = titan_moe("import", str(source), "--output", str(tmp_path / "full"))
    assert full.returncode == 2
    assert "is a directory that is not empty" in full.stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_layers_that_predict_further_ahead_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs"
    save("glm4_moe", folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    safetensors.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="the files have 4"):
        verb("import", str(folder), "--output", str(tmp_path / "ours"))
    edit(folder, num_nextn_predict_layers=1)
    assert verb("import", str(folder), "--output", str(tmp_path / "ours")) == 0
    assert "not imported: 1 tensors that the model itself does not use" in capsys.readouterr().out
