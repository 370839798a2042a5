"""A directory that AutoModelForCausalLM and AutoTokenizer of Transformers load without custom code.

    config.json  generation_config.json  model-00001-of-00006.safetensors  model.safetensors.index.json
    tokenizer.json  tokenizer_config.json  tokenizer.model  titan_moe.json  README.md

A shard is a layer; the first has the embedding, the last the final norm and the output projection.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_moe import __version__
from titan_moe.data.json_tokenizer import JsonTokenizer
from titan_moe.errors import UserError
from titan_moe.runtime.optional import optional
from titan_moe.weights.architectures import Architecture, fitting
from titan_moe.weights.card import model_card
from titan_moe.weights.entries import Entry
from titan_moe.weights.names import layer_entries, outer_entries
from titan_moe.weights.source import Source
from titan_moe.weights.target import check_target, written_beside
from titan_moe.weights.tokenizer import Pieces, write_json, write_tokenizer

METADATA_FILE = "titan_moe.json"
FORMAT_VERSION = 1


def export_folder(source: Source, out: Path, dtype: str) -> list[str]:
    """Writes the directory `out`. Returns what to tell the user, in lines. Raises UserError.

    dtype: "float32" or "bfloat16"; tensors that Transformers keeps in float32 are written so."""
    save_file = optional("safetensors.torch", "hf").save_file
    failure = optional("safetensors", "hf").SafetensorError
    optional("tokenizers", "hf")
    check_target(out, is_folder=True)
    architecture = fitting(source.model, source.biased)
    own = source.tokenizer
    pieces = own if isinstance(own, JsonTokenizer) else Pieces(own, source.run / "tokenizer.model")
    shards = list(shards_of(architecture, source))
    index: dict[str, str] = {}
    size = 0
    with written_beside(out, is_folder=True) as folder:
        if isinstance(pieces, JsonTokenizer):
            write_json(pieces, folder, source.training.seq_len)
        else:
            write_tokenizer(pieces, folder, source.training.seq_len)
        for number, entries in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = shard(source, entries, getattr(torch, dtype))
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except failure as error:
                raise UserError(f"--output = {str(out)!r}: can't be written: {error}") from error
            # The package makes files that only their owner may read.
            (folder / file).chmod((folder / "tokenizer.json").stat().st_mode)
            index |= dict.fromkeys(tensors, file)
            size += sum(value.nbytes for value in tensors.values())
        contents: dict[str, dict[str, Any]] = {
            "model.safetensors.index.json": {"metadata": {"total_size": size}, "weight_map": index},
            "config.json": config(source, architecture, pieces, dtype),
            "generation_config.json": symbols(pieces),
            METADATA_FILE: metadata(source, architecture),
        }
        for name, values in contents.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        card = model_card(source, f"the architecture `{architecture.model_type}` of Transformers, in {dtype}")
        (folder / "README.md").write_text(card, encoding="utf-8")
    described = f"step {source.state.step:,}, {source.parameters:,} parameters in {dtype}"
    lines = [f"{out}: {architecture.model_type} for Transformers, {described}"]
    scale = source.model.moe.route_scale
    if scale != 1.0 and not architecture.names.scales_gates:
        lines.append(f"model.moe.route_scale = {scale} is multiplied into the experts' down projections")
    return lines


def shards_of(architecture: Architecture, source: Source) -> Iterator[list[Entry]]:
    """The tensors of each file."""
    names, model = architecture.names, source.model
    first, *last = outer_entries(names, model)
    yield [first]
    for layer in range(model.layers):
        yield list(layer_entries(names, model, layer))
    yield last


def shard(source: Source, entries: list[Entry], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one file, by name."""
    ours = source.read({entry.ours for entry in entries if entry.ours})
    return {
        entry.name: entry.to_file(ours).to(torch.float32 if entry.float32 else dtype).contiguous() for entry in entries
    }


def symbols(pieces: Pieces | JsonTokenizer) -> dict[str, Any]:
    """Ids of the symbols that begin and end a document and fill a batch."""
    ids = {"bos_token_id": pieces.bos, "eos_token_id": pieces.eos, "pad_token_id": pieces.pad}
    return {key: i if i >= 0 else None for key, i in ids.items()}


def config(source: Source, architecture: Architecture, pieces: Pieces | JsonTokenizer, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    return architecture.config(source.model, source.training.seq_len) | symbols(pieces) | {"dtype": dtype}


def metadata(source: Source, architecture: Architecture) -> dict[str, Any]:
    """What config.json can't say: our own table [model], with the original `route_scale`, and where the weights are from."""
    return {
        "format_version": FORMAT_VERSION,
        "titan_moe": __version__,
        "architecture": architecture.model_type,
        "model": source.model.model_dump(mode="json"),
        "step": source.state.step,
        "tokenizer": source.tokenizer.fingerprint,
    }
