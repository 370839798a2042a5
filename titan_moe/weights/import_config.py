"""From the config.json of another program's model to our table [model].

Every key that changes what a model computes is read or checked; a model that ours can't compute is refused with the key.
Defaults of keys that are not there are those of transformers 5.24 (`models/*/configuration_*.py`), and for `deepseek` those
of DeepSeek-MoE-16B's own configuration file. Code that a directory brings along is never run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from titan_moe.config.checks import check_model, check_sizes
from titan_moe.config.tables import Config, Model
from titan_moe.errors import UserError
from titan_moe.runtime.json_file import first_mistake, read_object

CONFIG_FILE = "config.json"
CONFIG_BYTES = 16 << 20
LARGEST_FLOOR = 1e-9  # of a sum of gate weights
T = TypeVar("T", bool, int, float)


class Facts:
    """The keys of a config.json, each with the type that it must have."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def wrong(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.path}: {key} = {str(self.values.get(key))[:80]}: {problem}")

    def read(self, kind: type[T], keys: str, default: T | None = None) -> T:
        """The value of the first of some keys (separated by spaces) that is there and not null."""
        for key in keys.split():
            value = self.values.get(key)
            if value is None:
                continue
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise self.wrong(key, f"must be a value of type {kind.__name__}")
            return value
        if default is None:
            raise UserError(f"{self.path}: has no key {keys.split()[0]!r}; it is no complete configuration")
        return default

    def count(self, keys: str, default: int | None = None) -> int:
        number = self.read(int, keys, default)
        if not 0 <= number < 1 << 31:
            raise self.wrong(keys.split()[0], "must be a natural number")
        return number

    def must_be(self, key: str, *allowed: Any) -> None:
        """Raises UserError unless the key has one of these values or is not there."""
        if key in self.values and self.values[key] not in (None, *allowed):
            raise self.wrong(
                key, f"our model can't compute that; only {' or '.join(map(str, allowed)) or 'null'} can be imported"
            )


def read_facts(folder: Path) -> Facts:
    """The config.json of a directory. Raises UserError."""
    path = folder / CONFIG_FILE
    values = read_object(
        path.resolve(),
        lambda values: values,
        missing=UserError(f"{folder}: has no {CONFIG_FILE}; give the directory of a model"),
        unreadable=UserError,
        invalid=lambda what: UserError(f"{path}: is no JSON: {what}"),
        limit=CONFIG_BYTES,
    )
    if not isinstance(values, dict):
        raise UserError(f"{path}: is no configuration of a model")
    return Facts(values, path)


def attention(facts: Facts, norm_eps: float, theta: float, tied: bool = False, fraction: float = 1.0) -> dict[str, Any]:
    """The options of [model] that every architecture has. Arguments: the architecture's defaults."""
    facts.must_be("hidden_act", "silu")
    heads, dim = facts.count("num_attention_heads"), facts.count("hidden_size")
    rotary = Facts(facts.values.get("rope_parameters") or facts.values.get("rope_scaling") or {}, facts.path)
    if not isinstance(rotary.values, dict):
        raise facts.wrong("rope_parameters", "must be a table")
    for key in ("rope_type", "type"):
        if rotary.values.get(key) not in (None, "default"):
            raise UserError(
                f"{facts.path}: {key} = {str(rotary.values[key])[:80]!r}: only plain rotary embeddings can be imported "
                "(rope_type 'default')"
            )
    values = {
        "dim": dim,
        "layers": facts.count("num_hidden_layers"),
        "heads": heads,
        "kv_heads": facts.count("num_key_value_heads", heads),
        "head_dim": facts.count("head_dim", 0),
        "norm_eps": facts.read(float, "rms_norm_eps", norm_eps),
        "rope_theta": rotary.read(float, "rope_theta", facts.read(float, "rope_theta", theta)),
        "rope_fraction": rotary_fraction([rotary, facts], fraction),
        "tie_embeddings": facts.read(bool, "tie_word_embeddings", tied),
        "vocab_size": facts.count("vocab_size"),
    }
    if heads and values["head_dim"] * heads == dim:
        values["head_dim"] = 0
    return values


def rotary_fraction(tables: list[Facts], default: float) -> float:
    """The share of a head that is turned. Raises UserError for a share in an architecture that always turns all of it (1)."""
    key = "partial_rotary_factor"
    given = [table for table in tables if table.values.get(key) is not None]
    if default == 1.0:
        for table in given:
            table.must_be(key, 1.0)
        return default
    return given[0].read(float, key) if given else default


def no_window(facts: Facts) -> None:
    """Raises UserError for attention that sees only the last tokens of a text."""
    window = facts.values.get("sliding_window")
    positions = facts.count("max_position_embeddings", 0)
    if facts.read(bool, "use_sliding_window", True) and isinstance(window, int) and 0 < window < positions:
        raise facts.wrong("sliding_window", "our model attends to the whole text; only null can be imported")
    kinds = facts.values.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        raise facts.wrong("layer_types", "only 'full_attention' can be imported")


def shared_of(facts: Facts, width: int, hidden: int) -> int:
    """How many experts of the routed ones' width the shared expert is. Raises UserError."""
    if hidden == 0 or width % hidden:
        raise facts.wrong(
            "shared_expert_intermediate_size", f"must be a multiple of moe_intermediate_size = {hidden} to be imported"
        )
    return width // hidden


def dense_first(facts: Facts) -> int:
    """Dense layers before the MoE layers, of the keys of the Qwen models. Raises UserError for another order."""
    layers, every = facts.count("num_hidden_layers"), facts.count("decoder_sparse_step", 1)
    listed = facts.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise facts.wrong("mlp_only_layers", "must be a list of layers")
    if every != 1:
        raise facts.wrong(
            "decoder_sparse_step", "our model has an MoE in every layer after the first dense ones; only 1 can be"
        )
    dense = sorted({layer for layer in listed if 0 <= layer < layers})
    if dense != list(range(len(dense))):
        raise facts.wrong("mlp_only_layers", "only the first layers of our model can be dense")
    return len(dense)


def moe_of(facts: Facts, hidden: str, dense: int, normalize: bool | None = None, **more: Any) -> dict[str, Any]:
    """The options of [model.moe] that every architecture has.

    hidden: key of the experts' width. normalize: None: as its key says."""
    values = {
        "experts": facts.count("num_experts num_local_experts n_routed_experts moe_num_experts"),
        "top_k": facts.count("num_experts_per_tok moe_k"),
        "hidden_dim": facts.count(hidden),
        "first_dense_layers": dense,
        "normalize_topk": facts.read(bool, "norm_topk_prob", False) if normalize is None else normalize,
        **more,
    }
    if dense:
        width = facts.count("intermediate_size")
        usual = values["hidden_dim"] * (values["top_k"] + values.get("shared_experts", 0))
        values["dense_hidden_dim"] = 0 if width == usual else width
    return values


def mixtral(facts: Facts) -> dict[str, Any]:
    no_window(facts)
    return attention(facts, 1e-5, 1e6) | {"moe": moe_of(facts, "intermediate_size", 0, normalize=True)}


def olmoe(facts: Facts) -> dict[str, Any]:
    facts.must_be("attention_bias", False)
    facts.must_be("clip_qkv")
    return attention(facts, 1e-5, 1e4) | {"qk_norm": "projection", "moe": moe_of(facts, "intermediate_size", 0)}


def qwen2_moe(facts: Facts) -> dict[str, Any]:
    check_qwen_window(facts)
    width = facts.count("shared_expert_intermediate_size", 5632)
    shared = shared_of(facts, width, facts.count("moe_intermediate_size"))
    moe = moe_of(facts, "moe_intermediate_size", dense_first(facts), shared_experts=shared, shared_gate=shared > 0)
    return attention(facts, 1e-6, 1e4) | {"qkv_bias": facts.read(bool, "qkv_bias", True), "moe": moe}


def qwen3_moe(facts: Facts) -> dict[str, Any]:
    check_qwen_window(facts)
    facts.must_be("attention_bias", False)
    return attention(facts, 1e-6, 1e4) | {
        "qk_norm": True,
        "moe": moe_of(facts, "moe_intermediate_size", dense_first(facts)),
    }


def check_qwen_window(facts: Facts) -> None:
    if facts.read(bool, "use_sliding_window", False):
        no_window(facts)


def glm4_moe(facts: Facts) -> dict[str, Any]:
    facts.must_be("n_group", 1)
    facts.must_be("topk_group", 1)
    moe = moe_of(
        facts,
        "moe_intermediate_size",
        facts.count("first_k_dense_replace", 1),
        facts.read(bool, "norm_topk_prob", True),
        shared_experts=facts.count("n_shared_experts", 1),
        score="sigmoid",
        route_scale=facts.read(float, "routed_scaling_factor", 1.0),
    )
    return attention(facts, 1e-5, 1e4, fraction=0.5) | {
        "qkv_bias": facts.read(bool, "attention_bias", False),
        "qk_norm": facts.read(bool, "use_qk_norm", False),
        "moe": moe,
    }


def ernie4_5_moe(facts: Facts) -> dict[str, Any]:
    facts.must_be("use_bias", False)
    facts.must_be("moe_layer_interval", 1)
    facts.must_be("moe_layer_end_index", -1, facts.count("num_hidden_layers") - 1)
    if facts.read(float, "moe_norm_min", 1e-12) > LARGEST_FLOOR:
        raise facts.wrong("moe_norm_min", f"our model has no such floor; only up to {LARGEST_FLOOR} can be imported")
    moe = moe_of(
        facts,
        "moe_intermediate_size",
        facts.count("moe_layer_start_index", 1),
        normalize=True,
        shared_experts=facts.count("moe_num_shared_experts", 2),
    )
    return attention(facts, 1e-5, 5e5, tied=True) | {"moe": moe}


def deepseek(facts: Facts) -> dict[str, Any]:
    facts.must_be("attention_bias", False)
    facts.must_be("scoring_func", "softmax")
    facts.must_be("moe_layer_freq", 1)
    facts.must_be("routed_scaling_factor", 1, 1.0)
    moe = moe_of(
        facts,
        "moe_intermediate_size",
        facts.count("first_k_dense_replace", 0),
        shared_experts=facts.count("n_shared_experts", 0),
    )
    return attention(facts, 1e-6, 1e4) | {"moe": moe}


def dense_moe(facts: Facts) -> dict[str, Any]:
    """A dense model in our terms: every layer dense, as wide as one expert."""
    layers, width = facts.count("num_hidden_layers"), facts.count("intermediate_size")
    return {"experts": 1, "top_k": 1, "hidden_dim": width, "first_dense_layers": layers}


def llama(facts: Facts) -> dict[str, Any]:
    facts.must_be("attention_bias", False)
    facts.must_be("mlp_bias", False)
    return attention(facts, 1e-6, 1e4) | {"moe": dense_moe(facts)}


def qwen3(facts: Facts) -> dict[str, Any]:
    check_qwen_window(facts)
    facts.must_be("attention_bias", False)
    values = attention(facts, 1e-6, 1e4)
    if "head_dim" not in facts.values:
        values["head_dim"] = 128
    return values | {"qk_norm": True, "moe": dense_moe(facts)}


READERS: dict[str, Callable[[Facts], dict[str, Any]]] = {
    read.__name__: read
    for read in (mixtral, olmoe, qwen2_moe, qwen3_moe, glm4_moe, ernie4_5_moe, deepseek, llama, qwen3)
}
"""By `model_type`."""


def model_of(facts: Facts) -> tuple[str, Model]:
    """The `model_type`, and our table [model]. Raises UserError for what our model can't compute."""
    kind = facts.values.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        what = f"{facts.path}: model_type = {str(kind)[:80]!r}"
        known = f"these can be imported: {', '.join(READERS)}"
        if "auto_map" in facts.values:
            raise UserError(f"{what} is computed by code in its directory (auto_map), which is never run; {known}")
        raise UserError(f"{what}: no such architecture is known; {known}")
    facts.must_be("quantization_config")
    try:
        model = Model.model_validate(READERS[kind](facts))
    except ValidationError as error:
        raise UserError(f"{facts.path}: model.{first_mistake(error)}") from error
    for check in (check_model, check_sizes):
        check(Config(model=model), lambda key: f"{facts.path}: {key}")
    return kind, model
