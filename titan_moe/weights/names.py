"""The names and shapes of the tensors of each Transformers architecture, and the tensors of ours that they hold.

Source: transformers 5.24, `models/*/modeling_*.py` and `conversion_mapping.py`. On disk every expert has tensors of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from titan_moe.config.tables import Model
from titan_moe.weights.entries import SAME, Change, Entry, InterleavedRotary, Scaled

HALF_GATE = 1e-20
"""Weight of a gate whose sigmoid is to be 1/2. Not 0: llama.cpp computes the sigmoid as silu(x) / x."""


@dataclass(frozen=True)
class Names:
    """How the tensor names and conventions of an architecture differ from those of the others."""

    moe: str = "mlp"
    """The MoE layer, below `model.layers.N`."""
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Gate, up and down of an expert, below `experts.E`."""
    fused_experts: bool = False
    """Whether the experts of a layer are two tensors: `experts.gate_up_proj` (E, 2F, D), `experts.down_proj` (E, D, F)."""
    shared: str = ""
    """The shared experts, one MLP; empty: there are none."""
    empty_shared: bool = True
    """Whether the shared experts are in the file, as tensors without numbers, where the model has none."""
    gated_shared: bool = False
    """Whether the shared expert's output is multiplied by the sigmoid of a linear map of the token."""
    balancing_bias: str = ""
    """The balancing bias, below the MoE layer; empty: there is none."""
    bias_shape: tuple[int, ...] = ()
    """Dimensions before the experts'."""
    scales_gates: bool = False
    """Whether it has a factor on the gate weights. Without one, `model.moe.route_scale` goes into the experts' down."""
    qkv_bias: bool = False
    """Whether q, k and v always have biases. Where ours have none the file gets zeros."""
    interleaved_rotary: bool = False
    float32_router: bool = False
    """Whether Transformers keeps router and balancing bias in float32."""
    untied_head: bool = False
    """Whether the output projection is in the file even where it is the embedding, for programs that do not tie them."""


NAMES: dict[str, Names] = {
    "qwen2_moe": Names(shared="shared_expert", gated_shared=True, qkv_bias=True),
    "qwen3_moe": Names(),
    "mixtral": Names(moe="block_sparse_moe", parts=("w1", "w3", "w2")),
    "olmoe": Names(),
    "lara_mini": Names(shared="shared_expert", fused_experts=True),
    "ernie4_5_moe": Names(
        shared="shared_experts",
        empty_shared=False,
        balancing_bias="moe_statics.e_score_correction_bias",
        bias_shape=(1,),
        interleaved_rotary=True,
        float32_router=True,
    ),
    "glm4_moe": Names(
        shared="shared_experts",
        balancing_bias="gate.e_score_correction_bias",
        scales_gates=True,
        float32_router=True,
        untied_head=True,
    ),
}


# Architectures that are imported and not written: dense ones, and one that is not in Transformers.
ONLY_IMPORTED: dict[str, Names] = {
    "llama": Names(),
    "qwen3": Names(),
    "deepseek": Names(shared="shared_experts", empty_shared=False),
}


def dense_width(model: Model) -> int:
    """Hidden width of the first dense layers."""
    return model.moe.dense_width


def kv_heads(model: Model) -> int:
    return model.kv_heads or model.heads


def outer_entries(names: Names, model: Model) -> Iterator[Entry]:
    """The tensors outside of the layers. model: with its vocabulary size."""
    matrix = (model.vocab_size, model.dim)
    yield Entry("model.embed_tokens.weight", matrix, "embedding")
    yield Entry("model.norm.weight", (model.dim,), "norm.weight")
    if not model.tie_embeddings:
        yield Entry("lm_head.weight", matrix, "output.weight")
    elif names.untied_head:
        yield Entry("lm_head.weight", matrix, "embedding")


def layer_entries(names: Names, model: Model, layer: int) -> Iterator[Entry]:
    """The tensors of one layer."""
    ours, file, dim = f"layers.{layer}", f"model.layers.{layer}", (model.dim,)
    yield Entry(f"{file}.input_layernorm.weight", dim, f"{ours}.attention_norm.weight")
    yield from attention_entries(names, model, f"{file}.self_attn", f"{ours}.attention")
    yield Entry(f"{file}.post_attention_layernorm.weight", dim, f"{ours}.feed_forward_norm.weight")
    if layer < model.moe.first_dense_layers:
        yield from mlp_entries(f"{file}.mlp", f"{ours}.feed_forward", model.dim, dense_width(model))
    else:
        yield from moe_entries(names, model, f"{file}.{names.moe}", f"{ours}.moe")


def attention_entries(names: Names, model: Model, file: str, ours: str) -> Iterator[Entry]:
    width = model.head_width
    heads = {"q": model.heads, "k": kv_heads(model), "v": kv_heads(model)}
    for kind, count in heads.items():
        rows = count * width
        change: Change = InterleavedRotary(count) if names.interleaved_rotary and kind != "v" else SAME
        yield Entry(f"{file}.{kind}_proj.weight", (rows, model.dim), f"{ours}.w{kind}.weight", change=change)
        if names.qkv_bias or model.qkv_bias:
            yield Entry(f"{file}.{kind}_proj.bias", (rows,), f"{ours}.w{kind}.bias" if model.qkv_bias else "")
    yield Entry(f"{file}.o_proj.weight", (model.dim, model.heads * width), f"{ours}.wo.weight")
    if model.qk_norm:
        for kind in "qk":
            normed = (heads[kind] if model.qk_norm == "projection" else 1) * width
            yield Entry(f"{file}.{kind}_norm.weight", (normed,), f"{ours}.{kind}_norm.weight")


def mlp_entries(file: str, ours: str, dim: int, width: int, down: Change = SAME) -> Iterator[Entry]:
    """A dense SwiGLU. ours: empty for one that our model does not have; it gets zeros, or no numbers when `width` is 0."""
    for kind in ("gate", "up"):
        yield Entry(f"{file}.{kind}_proj.weight", (width, dim), ours and f"{ours}.{kind}.weight")
    yield Entry(f"{file}.down_proj.weight", (dim, width), ours and f"{ours}.down.weight", change=down)


def moe_entries(names: Names, model: Model, file: str, ours: str) -> Iterator[Entry]:
    moe, dim = model.moe, model.dim
    float32 = names.float32_router
    yield Entry(f"{file}.gate.weight", (moe.experts, dim), f"{ours}.router.weight", float32=float32)
    if names.balancing_bias:
        shape = (*names.bias_shape, moe.experts)
        yield Entry(f"{file}.{names.balancing_bias}", shape, f"{ours}.router.expert_bias", float32=float32)
    yield from expert_entries(names, model, f"{file}.experts", f"{ours}.experts")
    width = moe.hidden_dim * moe.shared_experts
    if names.shared and (width or names.empty_shared):
        halved = Scaled(2.0) if names.gated_shared and not moe.shared_gate else SAME
        yield from mlp_entries(f"{file}.{names.shared}", f"{ours}.shared" if width else "", dim, width, halved)
        if names.gated_shared:
            gate = f"{ours}.shared_gate.weight" if moe.shared_gate else ""
            yield Entry(f"{file}.{names.shared}_gate.weight", (1, dim), gate, value=HALF_GATE)


def expert_entries(names: Names, model: Model, file: str, ours: str) -> Iterator[Entry]:
    """The routed experts of a layer."""
    moe, dim = model.moe, model.dim
    hidden = moe.hidden_dim
    scale = SAME if names.scales_gates or moe.route_scale == 1.0 else Scaled(moe.route_scale)
    if names.fused_experts:
        yield Entry(f"{file}.gate_up_proj", (moe.experts, 2 * hidden, dim), f"{ours}.gate_up")
        yield Entry(f"{file}.down_proj", (moe.experts, dim, hidden), f"{ours}.down", change=scale)
        return
    gate, up, down = names.parts
    for expert in range(moe.experts):
        of = f"{file}.{expert}"
        yield Entry(f"{of}.{gate}.weight", (hidden, dim), f"{ours}.gate_up", (expert, 0))
        yield Entry(f"{of}.{up}.weight", (hidden, dim), f"{ours}.gate_up", (expert, 1))
        yield Entry(f"{of}.{down}.weight", (dim, hidden), f"{ours}.down", (expert,), scale)
