"""One MoE layer of ours and of other libraries, at the same sizes, as a function that runs it forward and backward.

Shared by bench_peers.py and check_gpu.py. The libraries are optional; `missing` says which one is not installed.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titan_moe.config.tables import Model
from titan_moe.model.moe import MoELayer
from torchtitan_ext.carry import empty_carry
from torchtitan_ext.terms import Setting, Terms, Tokens, build_terms

Work = Callable[[], object]


def missing(package: str) -> bool:
    """Whether a package is not installed."""
    return importlib.util.find_spec(package) is None


def fill(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


def placed(layer: nn.Module, x_TD: Tensor, backend: str) -> nn.Module:
    """The layer with random weights, on the device and in the type of x; compiled if there is a backend."""
    layer.to(x_TD.device)
    fill(layer)
    layer.to(x_TD.dtype).train()
    if backend:
        layer.compile(backend=backend)
    return layer


def our_terms(settings: Model, weights: dict[str, Any]) -> Terms:
    return build_terms(weights, Setting(settings.moe.top_k, settings.moe.hidden_dim))


def our_layer(
    settings: Model, weights: dict[str, Any], x_TD: Tensor, backend: str = ""
) -> Callable[[], tuple[Tensor, Tensor, Tensor | None]]:
    """Returns output, terms and the gradient of x.

    weights: by term. x_TD: (T, D), its device and type are the layer's. backend: of torch.compile; empty: eager.
    """
    terms, device, count = our_terms(settings, weights), x_TD.device, len(x_TD)
    layer = placed(MoELayer(settings.dim, settings.moe, terms, 1), x_TD, backend)
    for moe in layer.modules():
        if hasattr(moe, "expert_bias"):
            moe.expert_bias = moe.expert_bias.float()
    width, measures = terms.carried_width(settings.moe.experts), len(terms.measures)
    carry = empty_carry(len(terms.names), count, 2, settings.moe.experts, torch.float32, device, width, measures)
    sums = torch.zeros(2, terms.sums_width(settings.moe.experts), device=device)
    carry = carry._replace(previous=torch.ones_like(carry.previous), term_sums=sums)
    tokens = Tokens(
        torch.full((1, count), 1.0 / count, device=device),
        torch.arange(1, device=device),
        torch.tensor(1, device=device),
        torch.arange(count, device=device),
    )
    gradient, term_weights = (
        torch.randn_like(x_TD),
        torch.tensor([t.options.weight for t in terms.terms], device=device),
    )

    def work() -> tuple[Tensor, Tensor, Tensor | None]:
        x = x_TD.detach().requires_grad_()
        out, after, _ = layer(x, carry, tokens)
        after = terms.complete(after)
        # The objective's gradient, without the copy of its weights to the device, which happens once per microbatch.
        outputs, gradients = ([out, after.terms], [gradient, term_weights]) if terms.names else ([out], [gradient])
        torch.autograd.backward(outputs, gradients)
        layer.zero_grad()
        return out.detach(), after.terms.detach(), x.grad

    return work


def plain_work(layer: nn.Module, x_TD: Tensor) -> Work:
    """A layer that takes (1, T, D) and returns the output, alone or first."""
    gradient = torch.randn(1, *x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)

    def work() -> None:
        x = x_TD.detach().unsqueeze(0).requires_grad_()
        out = layer(x)
        (out[0] if isinstance(out, tuple) else out).backward(gradient)
        layer.zero_grad()

    return work


def torchtitan_module(settings: Model) -> nn.Module:
    """TorchTitan's `MoE` with its default parts, without a load balancing bias. It supports bfloat16 only."""
    from torchtitan.models.common.config_utils import make_router_config
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    moe = settings.moe
    sizes: dict[str, int] = {"num_experts": moe.experts, "top_k": moe.top_k}
    experts = GroupedExperts.Config(dim=settings.dim, hidden_dim=moe.hidden_dim, num_experts=moe.experts)
    routed = RoutedExperts.Config(inner_experts=experts, token_dispatcher=LocalTokenDispatcher.Config(**sizes))
    router = make_router_config(dim=settings.dim, gate_param_init={}, score_func="softmax", **sizes)
    config = MoE.Config(num_experts=moe.experts, routed_experts=routed, router=router, load_balance_coeff=None)
    layer: nn.Module = config.build()
    return layer


def torchtitan_layer(settings: Model, x_TD: Tensor, backend: str = "") -> Work:
    return plain_work(placed(torchtitan_module(settings), x_TD, backend), x_TD)


def mixtral_config(settings: Model, positions: int, balance_weight: float = 0.0) -> Any:
    """Transformers' Mixtral of the same size, with its fastest attention and experts."""
    import transformers

    config: Any = transformers.MixtralConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.dim,
        intermediate_size=settings.moe.hidden_dim,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        num_local_experts=settings.moe.experts,
        num_experts_per_tok=settings.moe.top_k,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=balance_weight,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    return config


def transformers_layer(settings: Model, x_TD: Tensor, backend: str = "") -> Work:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = mixtral_config(settings.model_copy(update={"vocab_size": 512}), len(x_TD))
    return plain_work(placed(MixtralSparseMoeBlock(config), x_TD, backend), x_TD)


def sonicmoe_layer(settings: Model, x_TD: Tensor, backend: str = "") -> Work:
    """SonicMoE's layer; it runs on Hopper cards and newer, and refuses to be compiled."""
    if backend:
        raise RuntimeError("SonicMoE cannot be compiled")
    from sonicmoe import MoE  # type: ignore[import-not-found]
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]

    moe = settings.moe
    layer = MoE(
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        hidden_size=settings.dim,
        intermediate_size=moe.hidden_dim,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    )
    return plain_work(placed(layer, x_TD, ""), x_TD)
