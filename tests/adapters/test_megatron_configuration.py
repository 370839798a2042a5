"""The adapter's configuration, refusals, flags and specs. All of it is examined in one process, whose findings the tests
check, since importing Megatron-Core takes seconds and the stand-ins for CUDA must not reach other tests."""

import argparse
import copy
import functools
from typing import Any

import pytest

from tests.helpers.megatron_models import LAYERS, block_spec, configuration, needs_megatron, start
from tests.helpers.ranks import launch

pytestmark = needs_megatron

SP, CP, LB = {"moe_sp_loss_coeff": 1.0}, {"moe_cp_loss_coeff": 1.0}, {"moe_lb_loss_coeff": 1.0}
ACTIVATED, TRANSITION = ({**CP, "moe_cp_source": name} for name in ("activated", "transition"))

# What is set, and what the message must contain: the name of the setting, and a word of the reason.
REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (SP | {"expert_tensor_parallel_size": 2}, ("sp with expert_tensor_parallel_size = 2", "hidden units")),
    (SP | {"moe_token_dispatcher_type": "flex"}, ("'flex'", "DeepEP")),
    (
        SP | {"moe_token_dispatcher_type": "allgather", "expert_model_parallel_size": 2},
        ("'allgather' and expert_model_parallel_size", "sums"),
    ),
    (SP | {"use_transformer_engine_op_fuser": True}, ("use_transformer_engine_op_fuser", "linear_fc2")),
    (SP | {"moe_shared_expert_overlap": True}, ("moe_shared_expert_overlap", "second time")),
    (SP | {"moe_router_padding_for_quantization": True}, ("moe_router_padding_for_quantization", "rows")),
    (SP | {"moe_router_padding_for_fp8": True}, ("moe_router_padding_for_fp8", "rows")),
    (SP | {"fp8": "hybrid"}, ("fp8 = 'hybrid'", "rows")),
    (SP | {"fp4": "e2m1"}, ("fp4 = 'e2m1'", "rows")),
    (SP | {"fine_grained_activation_offloading": True}, ("fine_grained_activation_offloading", "memory")),
    (SP | {"moe_use_legacy_grouped_gemm": True}, ("moe_use_legacy_grouped_gemm", "linear_fc2")),
    (SP | {"moe_router_topk": 1}, ("moe_router_topk = 1", "compares")),
    (SP | {"moe_expert_capacity_factor": 1.0}, ("moe_expert_capacity_factor = 1.0", "dropped")),
    (LB | {"moe_expert_rank_capacity_factor": 1.0}, ("moe_expert_rank_capacity_factor", "dropped")),
    (SP | {"overlap_moe_expert_parallel_comm": True}, ("overlap_moe_expert_parallel_comm", "interleaved")),
    (CP | {"enable_cuda_graph": True}, ("enable_cuda_graph", "CUDA graph")),
    (CP | {"external_cuda_graph": True}, ("external_cuda_graph", "CUDA graph")),
    (SP | {"cuda_graph_impl": "local"}, ("cuda_graph_impl = 'local'", "CUDA graph")),
    (CP | {"mtp_num_layers": 1}, ("mtp_num_layers = 1", "multi-token")),
    (LB | {"moe_router_load_balancing_type": "sinkhorn"}, ("'sinkhorn'", "scores")),
    (CP | {"moe_router_load_balancing_type": ["quantile_balancing"]}, ("'quantile_balancing'", "scores")),
    (LB | {"num_moe_experts": None}, ("num_moe_experts", "no experts")),
    (ACTIVATED | {"pipeline_model_parallel_size": 2}, ("'activated'", "pipeline_model_parallel_size = 2", "use 'all'")),
    (TRANSITION | {"pipeline_model_parallel_size": 2}, ("'transition'", "another rank")),
    (ACTIVATED | {"recompute_granularity": "full"}, ("recompute_granularity = 'full'", "reverse")),
    (
        TRANSITION | {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        ("recompute_modules with 'moe'", "reverse"),
    ),
    (TRANSITION | {"moe_cp_form": "log"}, ("moe_cp_form = 'log'", "mass")),
    (CP | {"is_hybrid_model": True, "pipeline_model_parallel_size": 2}, ("hybrid", "first")),
    (CP | {"moe_layer_freq": LAYERS}, ("moe_layer_freq", "fewer than two")),
    (LB | {"moe_lb_scope": "microbatch"}, ("moe_lb_scope = 'microbatch'", "aux_loss")),
    ({"moe_v_loss_coeff": 1.0, "moe_v_scope": "microbatch"}, ("moe_v_scope = 'microbatch'", "split")),
    ({"moe_sp_loss_coeff": -1.0}, ("moe_sp_loss_coeff = -1.0", "greater than or equal to 0")),
    (CP | {"moe_cp_source": "every"}, ("moe_cp_source = 'every'", "'all', 'activated' or 'transition'")),
]
ALLOWED: list[dict[str, Any]] = [
    CP | {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"},
    ACTIVATED | {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    CP | LB | {"fp8": "hybrid", "moe_token_dispatcher_type": "flex", "expert_tensor_parallel_size": 2},
    # With all coefficients 0, nothing is refused.
    {"fp8": "hybrid", "cuda_graph_impl": "local", "mtp_num_layers": 1, "moe_lb_scope": "microbatch"},
]


def attempted(settings: dict[str, Any]) -> str:
    """The message with which settings are refused; empty if they are not.

    They are set on a valid configuration, since Megatron itself refuses some of them on a machine without a GPU."""
    config = configuration()
    for name, value in settings.items():
        setattr(config, name, value)
    try:
        config.check_losses()
    except ValueError as error:
        return str(error)
    return ""


def message_of(function: Any, *arguments: Any, **words: Any) -> str:
    try:
        function(*arguments, **words)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def examine() -> dict[str, Any]:
    """Everything that the tests below look at."""
    start()
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from torchtitan_ext.adapters import megatron as adapter

    found: dict[str, Any] = {"refused": [attempted(one) for one, _ in REFUSED], "allowed": [*map(attempted, ALLOWED)]}
    found["constructor"] = message_of(configuration, moe_expert_capacity_factor=1.0, **SP)
    found["all"] = attempted(SP | {"fp8": "hybrid", "mtp_num_layers": 1})

    stock = configuration(special=False)
    copied = adapter.specialized_config(stock, moe_sp_loss_coeff=0.5)
    found["copied"] = (
        type(copied).__name__,
        copied.moe_sp_loss_coeff,
        copied.num_moe_experts,
        hasattr(stock, "moe_sp_loss_coeff"),
    )
    again = adapter.specialized_config(copied, moe_cp_loss_coeff=0.25)
    found["again"] = (again.moe_sp_loss_coeff, again.moe_cp_loss_coeff, copied.moe_cp_loss_coeff)
    attention = MLATransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, num_moe_experts=4)
    special = adapter.specialized_config(attention, **SP)
    found["mla"] = (type(special).__name__, isinstance(special, MLATransformerConfig))
    found["unknown"] = message_of(adapter.specialized_config, stock, moe_s_loss_coeff=1.0)
    found["refused copy"] = message_of(adapter.specialized_config, attention, moe_sp_loss_coeff=1.0, moe_cp_source="x")

    parser = adapter.add_arguments(argparse.ArgumentParser())
    words = ["--moe-sp-loss-coeff", "2e-3", "--moe-cp-source", "activated", "--moe-sp-above-chance"]
    found["arguments"] = adapter.coefficients_of(parser.parse_args(words))
    from torchtitan_ext.adapters.megatron.tracking import log_names, with_names

    found["names"] = log_names(copied)
    found["asked"] = [
        with_names(lambda *_, track_names=None: track_names, ["sp_loss"])(1.0, track_names=names)
        for names in (["z_loss"], ["sp_loss", "z_loss"], None)
    ]
    found["no arguments"] = adapter.coefficients_of(parser.parse_args([]))

    plain = block_spec(configuration(), special=False, grouped=False)
    special = adapter.specialized(plain)
    found["kinds"] = [kinds(layer.submodules.mlp) for spec in (plain, special) for layer in spec.layer_specs[:1]]
    found["twice"] = adapter.specialized(special) is special
    dense = ModuleSpec(module=TopKRouter)
    found["dense"] = adapter.specialized(dense) is dense
    found["no coefficients"] = message_of(build_layer, special, configuration(special=False))
    copies = [build_layer(copy.deepcopy(special), configuration(**ACTIVATED)) for _ in range(2)]
    found["neighbours"] = len({id(one.router.neighbours) for one in copies})

    class Other(MoELayer): ...

    mlp = plain.layer_specs[0].submodules.mlp
    found["other layer"] = message_of(adapter.specialized, changed(mlp, Other, TopKRouter))
    found["other router"] = message_of(adapter.specialized, changed(mlp, MoELayer, int))
    return found


def changed(mlp: Any, layer: Any, router: Any) -> Any:
    """The spec of an MoE layer with other classes, in the form that this version of Megatron has."""
    import dataclasses

    if isinstance(mlp, functools.partial):
        inner = dataclasses.replace(mlp.keywords["submodules"], router=router)
        return functools.partial(layer, **{**mlp.keywords, "submodules": inner})
    return dataclasses.replace(mlp, module=layer, submodules=dataclasses.replace(mlp.submodules, router=router))


def kinds(mlp: Any) -> tuple[str, str]:
    """Names of the classes of an MoE layer's spec and of its router."""
    layer = mlp.func if isinstance(mlp, functools.partial) else mlp.module
    inner = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    router = inner.router.func if isinstance(inner.router, functools.partial) else inner.router
    return layer.__name__, router.__name__


def build_layer(spec: Any, config: Any) -> Any:
    return spec.layer_specs[0].submodules.mlp(config=config)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return launch(1, examine)[0]


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=[words[0] for _, words in REFUSED])
def test_settings_that_make_a_loss_wrong_are_refused(index: int, found: dict[str, Any]) -> None:
    message = found["refused"][index]
    assert message.startswith("SpecializedConfig: ")
    assert "\n" not in message
    assert all(word in message for word in REFUSED[index][1]), message


def test_other_settings_are_not_refused(found: dict[str, Any]) -> None:
    assert found["allowed"] == [""] * len(ALLOWED)


def test_the_constructor_refuses_and_every_reason_is_named(found: dict[str, Any]) -> None:
    assert found["constructor"].startswith("ValueError: SpecializedConfig: sp with moe_expert_capacity_factor = 1.0")
    assert "fp8" in found["all"]
    assert "mtp_num_layers" in found["all"]


def test_a_configuration_made_by_megatron_gets_coefficients(found: dict[str, Any]) -> None:
    kind, weight, experts, changed_original = found["copied"]
    assert (kind, weight, experts, changed_original) == ("SpecializedConfig", 0.5, 8, False)
    assert found["again"] == (0.5, 0.25, 0.0)
    assert found["mla"] == ("SpecializedMLAConfig", True)
    assert found["unknown"] == "TypeError: specialized_config: moe_s_loss_coeff: no such field of Coefficients"
    assert found["refused copy"].startswith("ValueError: SpecializedMLAConfig: moe_cp_source = 'x'")


def test_flags(found: dict[str, Any]) -> None:
    given = {"moe_sp_loss_coeff": 2e-3, "moe_cp_source": "activated", "moe_sp_above_chance": True}
    assert found["arguments"] == found["no arguments"] | given
    assert [value for name, value in found["no arguments"].items() if "coeff" in name] == [0.0] * 4


def test_names_in_the_log(found: dict[str, Any]) -> None:
    assert found["names"] == ["sp_loss"]
    assert found["asked"] == [["z_loss", "sp_loss"], ["sp_loss", "z_loss"], None]  # None: all of them


def test_specs(found: dict[str, Any]) -> None:
    assert found["kinds"] == [("MoELayer", "TopKRouter"), ("SpecializedMoELayer", "SpecializedRouter")]
    assert found["twice"]
    assert found["dense"]
    assert found["neighbours"] == 1, "layers built from copies of one spec must find each other"
    assert "Other" in found["other layer"]
    assert "router" in found["other router"]
    assert "TransformerConfig has no coefficients" in found["no coefficients"]
