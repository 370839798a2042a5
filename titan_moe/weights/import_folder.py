"""A checkpoint to start from, made of another program's model.

    config.toml  tokenizer.model or tokenizer.json  checkpoints/step-00000000/

The tensors of one parameter are in memory at a time (of experts: those of a layer), in float32.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import tomli_w
import torch
from torch import Tensor

from titan_moe import __version__
from titan_moe.checkpoint.dcp import write_lazily
from titan_moe.checkpoint.manifest import entry_of, write_manifest
from titan_moe.checkpoint.run_dir import fsync_folder
from titan_moe.checkpoint.state import FORMAT_VERSION, STATE_FILE, dump
from titan_moe.config.tables import Config, Model, config_class
from titan_moe.data.stored import JSON_FILE, TOKENIZER_FILE, tokenizer_file
from titan_moe.data.tokenizer import Tokenizer, read_tokenizer
from titan_moe.errors import UserError
from titan_moe.model.transformer import Transformer
from titan_moe.weights.entries import Entry
from titan_moe.weights.import_config import model_of, read_facts
from titan_moe.weights.names import NAMES, ONLY_IMPORTED, Names, layer_entries, outer_entries
from titan_moe.weights.shards import Shards
from titan_moe.weights.target import check_target, written_beside
from torchtitan_ext.terms import Terms

STEP = "step-00000000"


def import_folder(source: Path, out: Path, tokenizer_path: str = "") -> list[str]:
    """Writes the directory `out` from the model in `source`. Returns what to tell the user, in lines. Raises UserError.

    tokenizer_path: a tokenizer in place of the directory's own."""
    check_target(out, is_folder=True)
    facts = read_facts(source)
    kind, model = model_of(facts)
    names = (NAMES | ONLY_IMPORTED)[kind]
    shards = Shards(source)
    shards.check_experts(model.moe.experts, model.layers - model.moe.first_dense_layers)
    entries = list(entries_of(names, model))
    further = facts.count("num_nextn_predict_layers", 0) if kind == "glm4_moe" else 0
    left_out = shards.check(entries, model.layers, further, model.tie_embeddings)
    tokenizer = tokenizer_of_model(source, tokenizer_path)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} pieces, and config.json says vocab_size = {model.vocab_size}"
        )
    parts: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.ours:
            parts.setdefault(entry.ours, []).append(entry)
    with torch.device("meta"):
        shapes = Transformer(model, Terms(), torch.float32).state_dict()
    # An architecture without a balancing bias chooses as one with zeros does.
    absent = [name for name in shapes if name not in parts]
    assert all(name.endswith(".expert_bias") for name in absent), absent

    def read(name: str) -> Tensor:
        ours = name.removeprefix("model.")
        if ours in absent:
            return torch.zeros(shapes[ours].shape)
        whole = {ours: torch.empty(shapes[ours].shape)}
        for entry in parts[ours]:
            entry.into_ours(shards.read(entry.name), whole)
        return whole[ours]

    with written_beside(out, is_folder=True) as folder:
        checkpoint = folder / "checkpoints" / STEP
        checkpoint.mkdir(parents=True)
        write_lazily(checkpoint, {f"model.{name}": value for name, value in shapes.items()}, read)
        (checkpoint / STATE_FILE).write_text(json.dumps(state(model, kind, tokenizer), indent=1))
        write_manifest(checkpoint, 0, {path.name: entry_of(path) for path in checkpoint.iterdir()})
        fsync_folder(checkpoint)
        (folder / tokenizer_file(tokenizer.model)).write_bytes(tokenizer.model)
        (folder / "config.toml").write_text(config_text(source, kind, model), encoding="utf-8")
    total = sum(value.numel() for name, value in shapes.items() if name not in absent)
    lines = [f"{out}: {kind} with {total:,} parameters, imported from {source}"]
    if left_out:
        lines.append(f"not imported: {len(left_out)} tensors that the model itself does not use, such as {left_out[0]}")
    if model.moe.first_dense_layers == model.layers:
        width = model.moe.dense_width
        lines.append(
            f"a dense model; make its layers experts: ./run_train.sh --checkpoint.upcycle_path={out} with its [model] table, "
            f"model.moe.first_dense_layers = 0 and model.moe.hidden_dim = {width}"
        )
    else:
        lines.append(
            f"train it: ./run_train.sh --config {out / 'config.toml'} --checkpoint.load_path={out} --job.name=NAME"
        )
    return lines


def entries_of(names: Names, model: Model) -> Iterator[Entry]:
    """The tensors of a whole model. A tied output projection is the embedding, whatever a file has as lm_head.weight."""
    yield from (
        entry for entry in outer_entries(names, model) if entry.name != "lm_head.weight" or not model.tie_embeddings
    )
    for layer in range(model.layers):
        yield from layer_entries(names, model, layer)


def tokenizer_of_model(source: Path, chosen: str) -> Tokenizer:
    """The chosen tokenizer, or the directory's: a sentencepiece model, else a tokenizer.json. Raises UserError."""
    if chosen:
        return read_tokenizer(chosen, "--tokenizer")
    problem = None
    for name in (TOKENIZER_FILE, JSON_FILE):
        if (source / name).exists():
            try:
                return read_tokenizer(str(source / name), str(source))
            except UserError as error:  # a tokenizer.model may be of another program
                problem = error
    if problem is not None:
        raise problem
    raise UserError(
        f"{source}: has neither {TOKENIZER_FILE} nor {JSON_FILE}; name the model's tokenizer with --tokenizer=PATH"
    )


def run_config(model: Model) -> Config:
    """The configuration of a checkpoint without a run: terms that need MoE layers are off where there are none."""
    config = config_class()(model=model)
    if model.moe.first_dense_layers < model.layers:
        return config
    off = {name: table.model_copy(update={"weight": 0.0}) for name, table in config.regularizers.options().items()}
    return config.model_copy(update={"regularizers": config.regularizers.model_copy(update=off)})


def state(model: Model, kind: str, tokenizer: Tokenizer) -> dict[str, object]:
    """The content of state.json."""
    return {
        "step": 0,
        "format_version": FORMAT_VERSION,
        "titan_moe": __version__,
        "torch": torch.__version__,
        "config": dump(run_config(model)),
        "data": "",
        "tokenizer": tokenizer.fingerprint,
        "scales": None,
        "norms": [],
        "skipped": 0,
        "imported": kind,
    }


def config_text(source: Path, kind: str, model: Model) -> str:
    """The content of config.toml: where the weights are from, and the table [model]."""
    values: dict[str, object] = {"model": model.model_dump()}
    where = repr(source.absolute().name)
    lines = [f"# Imported from {where}, architecture {kind}, by titan-moe {__version__}."]
    lines += ["# Start from these weights with --checkpoint.load_path and this file, or a file that extends it.", ""]
    if model.moe.first_dense_layers == model.layers:
        lines[1] = "# A dense model: its layers become experts with --checkpoint.upcycle_path (docs/weights.md)."
        enabled = [name for name, table in config_class()().regularizers.options().items() if table.weight > 0]
        values["regularizers"] = {name: {"weight": 0.0} for name in enabled}
    return "\n".join(lines) + "\n" + tomli_w.dumps(values)
