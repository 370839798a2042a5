"""The tensors of a GGUF file of llama.cpp's architecture glm4moe, and the tensors of ours that they hold.

That architecture computes every variant of our model: softmax or sigmoid scores, a balancing bias that enters only the choice,
gate weights divided by their sum or not, a factor on them, shared experts, first dense layers, norms of q and k. It always has
shared experts; a model without gets one of zeros. Source: llama.cpp, `src/models/glm4-moe.cpp`; `constants.py` of package gguf.
"""

from collections.abc import Iterator

from titan_moe.config.tables import Model
from titan_moe.weights.entries import Entry
from titan_moe.weights.names import dense_width, kv_heads


def shared_experts(model: Model) -> int:
    """Shared experts of the file."""
    return max(1, model.moe.shared_experts)


def first_entries(model: Model) -> Iterator[Entry]:
    yield Entry("token_embd.weight", (model.vocab_size, model.dim), "embedding")


def last_entries(model: Model) -> Iterator[Entry]:
    yield Entry("output_norm.weight", (model.dim,), "norm.weight", float32=True)
    if not model.tie_embeddings:
        yield Entry("output.weight", (model.vocab_size, model.dim), "output.weight")


def block_entries(model: Model, layer: int) -> Iterator[Entry]:
    """The tensors of one layer. Norms, router and balancing bias are float32, as in llama.cpp's own conversions."""
    ours, file, dim, width = f"layers.{layer}", f"blk.{layer}", model.dim, model.head_width
    yield Entry(f"{file}.attn_norm.weight", (dim,), f"{ours}.attention_norm.weight", float32=True)
    for kind, heads in {"q": model.heads, "k": kv_heads(model), "v": kv_heads(model)}.items():
        yield Entry(f"{file}.attn_{kind}.weight", (heads * width, dim), f"{ours}.attention.w{kind}.weight")
    yield Entry(f"{file}.attn_output.weight", (dim, model.heads * width), f"{ours}.attention.wo.weight")
    for kind in "qk" if model.qk_norm else "":
        yield Entry(f"{file}.attn_{kind}_norm.weight", (width,), f"{ours}.attention.{kind}_norm.weight", float32=True)
    yield Entry(f"{file}.post_attention_norm.weight", (dim,), f"{ours}.feed_forward_norm.weight", float32=True)
    if layer < model.moe.first_dense_layers:
        yield from mlp_entries(f"{file}.ffn_{{}}.weight", f"{ours}.feed_forward", dim, dense_width(model))
    else:
        yield from moe_entries(model, file, f"{ours}.moe")


def mlp_entries(file: str, ours: str, dim: int, width: int) -> Iterator[Entry]:
    """A dense SwiGLU. file: a name with {} for the part. ours: empty for one of zeros."""
    for kind in ("gate", "up", "down"):
        shape = (dim, width) if kind == "down" else (width, dim)
        yield Entry(file.format(kind), shape, ours and f"{ours}.{kind}.weight")


def moe_entries(model: Model, file: str, ours: str) -> Iterator[Entry]:
    moe, dim = model.moe, model.dim
    everywhere = slice(None)
    yield Entry(f"{file}.ffn_gate_inp.weight", (moe.experts, dim), f"{ours}.router.weight", float32=True)
    yield Entry(f"{file}.exp_probs_b.bias", (moe.experts,), f"{ours}.router.expert_bias", float32=True)
    wide = (moe.experts, moe.hidden_dim, dim)
    yield Entry(f"{file}.ffn_gate_exps.weight", wide, f"{ours}.experts.gate_up", (everywhere, 0))
    yield Entry(f"{file}.ffn_up_exps.weight", wide, f"{ours}.experts.gate_up", (everywhere, 1))
    yield Entry(f"{file}.ffn_down_exps.weight", (moe.experts, dim, moe.hidden_dim), f"{ours}.experts.down")
    width = moe.hidden_dim * shared_experts(model)
    yield from mlp_entries(f"{file}.ffn_{{}}_shexp.weight", f"{ours}.shared" if moe.shared_experts else "", dim, width)
