"""One file that llama.cpp serves: weights, tokenizer and everything else that it needs to know, as architecture glm4moe."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from titan_moe import __version__
from titan_moe.config.tables import Model
from titan_moe.data.tokenizer import SPACE
from titan_moe.errors import UserError
from titan_moe.runtime.optional import optional
from titan_moe.weights.entries import Entry
from titan_moe.weights.gguf_names import block_entries, first_entries, last_entries, shared_experts
from titan_moe.weights.names import dense_width, kv_heads
from titan_moe.weights.source import Source
from titan_moe.weights.target import check_target, written_beside
from titan_moe.weights.tokenizer import Kind, Pieces

ARCHITECTURE = "glm4moe"
BLOCK = 32  # consecutive weights of a row that share a scale in q8_0
SPACE_BYTE = "<0x20>"
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def check_options(model: Model) -> None:
    """Raises UserError for an option of [model] that this file does not have."""
    refused = {
        "model.qk_norm = 'projection'": model.qk_norm == "projection",
        "model.qkv_bias": model.qkv_bias,
        "model.rope_fraction below 1": model.rope_fraction < 1,
        "model.moe.shared_gate": model.moe.shared_gate,
    }
    for what, wrong in refused.items():
        if wrong:
            raise UserError(f"--format gguf: the file has no {what}; use --format hf")


def export_file(source: Source, out: Path, dtype: str) -> list[str]:
    """Writes the file `out`. Returns what to tell the user, in lines. Raises UserError.

    dtype: of `FILE_TYPES`. Norms, routers and balancing biases are always f32."""
    gguf = optional("gguf", "gguf")
    check_target(out, is_folder=False)
    check_options(source.model)
    pieces = Pieces(source.tokenizer, source.run / "tokenizer.model")
    groups = [list(first_entries(source.model))]
    groups += [list(block_entries(source.model, layer)) for layer in range(source.model.layers)]
    groups += [list(last_entries(source.model))]
    shorter = {entry.name for group in groups for entry in group if tensor_type(entry, dtype) not in (dtype, "f32")}
    with written_beside(out, is_folder=False) as file:
        writer = gguf.GGUFWriter(file, ARCHITECTURE)
        try:
            add_facts(writer, gguf, source, dtype)
            add_tokenizer(writer, pieces, source.model.vocab_size)
            for group in groups:
                for entry in group:
                    kind = gguf.GGMLQuantizationType[tensor_type(entry, dtype).upper()]
                    size = math.prod(gguf.quant_shape_to_byte_shape(entry.shape, kind))
                    writer.add_tensor_info(entry.name, entry.shape, np.float32, size, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for group in groups:
                ours = source.read({entry.ours for entry in group if entry.ours})
                for entry in group:
                    writer.write_tensor_data(encoded(entry.to_file(ours), tensor_type(entry, dtype), gguf))
        finally:
            writer.close()
    described = f"step {source.state.step:,}, {source.parameters:,} parameters in {dtype}"
    lines = [f"{out}: {ARCHITECTURE} for llama.cpp, {described}"]
    if shorter:
        lines.append(f"{len(shorter)} tensors are f16, since their rows are not multiples of {BLOCK}, as q8_0 needs")
    return lines


def tensor_type(entry: Entry, dtype: str) -> str:
    """The type of a tensor, of `FILE_TYPES`."""
    if entry.float32:
        return "f32"
    return "f16" if dtype == "q8_0" and entry.shape[-1] % BLOCK else dtype


def encoded(value: Tensor, kind: str, gguf: Any) -> npt.NDArray[Any]:
    """The numbers of a tensor as the file has them."""
    if kind == "q8_0":
        blocks: npt.NDArray[Any] = gguf.quants.quantize(value.contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
        return blocks
    if kind == "bf16":
        value = value.to(torch.bfloat16).view(torch.int16)  # numpy has no bfloat16
    elif kind == "f16":
        value = value.to(torch.float16)
    return value.contiguous().numpy()


def add_facts(writer: Any, gguf: Any, source: Source, dtype: str) -> None:
    """The model's sizes and variant, and where it is from."""
    model, moe = source.model, source.model.moe
    writer.add_type("model")
    writer.add_name(source.run.name)
    writer.add_description(f"written by titan-moe {__version__} from step {source.state.step}")
    writer.add_string("titan_moe.model", json.dumps(model.model_dump(mode="json")))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.layers)
    writer.add_context_length(source.training.seq_len)
    writer.add_embedding_length(model.dim)
    writer.add_feed_forward_length(dense_width(model))
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(kv_heads(model))
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_rope_dimension_count(model.head_width)
    writer.add_vocab_size(model.vocab_size)
    writer.add_leading_dense_block_count(moe.first_dense_layers)
    writer.add_expert_count(moe.experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_shared_count(shared_experts(model))
    writer.add_expert_feed_forward_length(moe.hidden_dim)
    writer.add_expert_weights_norm(moe.normalize_topk)
    writer.add_expert_weights_scale(moe.route_scale)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[moe.score.upper()])
    writer.add_nextn_predict_layers(0)


def add_tokenizer(writer: Any, pieces: Pieces, vocabulary: int) -> None:
    """The pieces with their scores. vocabulary: rows of the embedding; those beyond the pieces are unused."""
    more = vocabulary - len(pieces.texts)
    texts, kinds = list(pieces.texts), list(pieces.kinds)
    if not pieces.has_space and SPACE_BYTE in texts:
        # llama.cpp writes every space as U+2581 and looks for a piece; without one it would take that character's bytes.
        space = texts.index(SPACE_BYTE)
        texts[space], kinds[space] = SPACE, Kind.NORMAL
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*texts, *(f"[unused {number}]" for number in range(more))])
    writer.add_token_scores([*pieces.scores, *[0.0] * more])
    writer.add_token_types([*map(int, kinds), *[int(Kind.UNUSED)] * more])
    for name, i in (("bos", pieces.bos), ("eos", pieces.eos), ("unk", pieces.unknown), ("pad", pieces.pad)):
        if i >= 0:
            getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(pieces.adds_space and pieces.has_space)
