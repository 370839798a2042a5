"""TorchTitan's debug models, small, on a CPU: built from its own configurations, with or without the override."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ENTRY = "torchtitan_ext.adapters.torchtitan.losses"
KINDS = ("qwen3", "deepseek_v3")
WRAPPED = "_checkpoint_wrapped_module."


def configuration(kind: str, terms: dict[str, Any] | None = None, layers: int = 3) -> Any:
    """A Trainer.Config whose model has `layers` layers and runs on a CPU. terms: the override's options, None: no override."""
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
    from torchtitan.models.common.moe import MoE
    from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
    from torchtitan.models.qwen3.config_registry import qwen3_moe_debug

    config = {"qwen3": qwen3_moe_debug, "deepseek_v3": deepseek_v3_debugmodel}[kind]()
    model = config.model_spec.model
    model.layers = [*model.layers, *copy.deepcopy(model.layers)][:layers]
    for _, _, parent, name in list(model.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())
    for _, moe, _, _ in model.traverse(MoE.Config):
        _shrink(moe)
    if terms is not None:
        override(config, terms)
    return config


def override(config: Any, terms: dict[str, Any]) -> None:
    """As Trainer does for `--override.imports ENTRY=terms`."""
    from torchtitan.config.override import apply_overrides

    config.override.imports = [(ENTRY, terms)]
    apply_overrides(config.override, config)


def _shrink(moe: Any, experts: int = 8, hidden_dim: int = 64) -> None:
    """Fewer and smaller experts, so that a model is built in a tenth of a second."""
    routed = moe.routed_experts
    for part in (moe, moe.router, routed.inner_experts, routed.token_dispatcher):
        part.num_experts = experts
    moe.router.gate.out_features = experts
    moe.router.top_k = routed.token_dispatcher.top_k = 3
    routed.inner_experts.hidden_dim = hidden_dim


def built(config: Any, parallelize: Any = None) -> tuple[nn.Module, Any]:
    """The model with fixed weights, and its loss. parallelize: applied before the weights are drawn."""
    model = config.model_spec.model.build()
    torch.manual_seed(1)
    model.init_states(buffer_device=torch.device("cpu"))
    with torch.no_grad():
        # Routers of the debug models start near 0, where most choices are ties.
        for name, parameter in model.named_parameters():
            if name.endswith("router.gate.weight"):
                parameter.mul_(8.0)
    model = model if parallelize is None else parallelize(model)
    model.train()
    loss = config.loss.build(compile_config=config.compile)
    loss.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    return model, loss


def batch(sequences: int = 2, length: int = 24) -> tuple[Tensor, Tensor]:
    """Tokens and labels; some tokens have no label."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 2000, (sequences, length), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[0, : length // 3] = -100
    return tokens, labels


class Step(NamedTuple):
    hidden: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    counts: list[Tensor]


def step(model: nn.Module, loss: Any, tokens: Tensor, labels: Tensor, valid: Tensor | None = None) -> Step:
    """One forward and backward pass. valid: labelled tokens of the global batch."""
    valid = (labels != -100).sum() if valid is None else valid
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = model(tokens, positions=positions)
    value, _ = loss(hidden, labels, valid)
    value.backward()
    gradients = {name.replace(WRAPPED, ""): p.grad for name, p in model.named_parameters()}
    counts = [buffer for name, buffer in model.named_buffers() if name.endswith("tokens_per_expert_E")]
    return Step(hidden.detach(), value.detach(), gradients, counts)


def checkpointing(mode: str) -> Any:
    """TorchTitan's configuration of activation checkpointing: none, selective or full."""
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    return {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}[mode]


def checkpointed(mode: str, model: nn.Module) -> nn.Module:
    """The model with its blocks checkpointed."""
    config = checkpointing(mode)
    if config is not None:
        config.build(dump_folder="").apply(model)
    return model
