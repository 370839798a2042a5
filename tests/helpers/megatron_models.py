"""Tiny Megatron-Core models on a CPU, with and without the losses, and steps by Megatron's own schedule.

To be used in processes that `tests.helpers.ranks.launch` has started; `start` comes first there.
"""

import dataclasses
import functools
import importlib.util
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.helpers import megatron_cpu

INSTALLED = importlib.util.find_spec("megatron") is not None
needs_megatron = pytest.mark.skipif(not INSTALLED, reason="needs the package megatron-core")
EXPERTS, TOP_K, LAYERS, VOCABULARY, SEQUENCES, LENGTH = 8, 3, 4, 64, 4, 12
LENGTHS = (12, 7, 5, 9)
"""Tokens of each sequence that count, where padding is on."""


class Layout(NamedTuple):
    """Sizes of the parallel dimensions; what is left of the ranks is data parallelism."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    chunks: int = 1
    """Model chunks of a pipeline stage: more than one with Megatron's interleaved schedule."""

    @property
    def virtual(self) -> int | None:
        """Megatron's virtual_pipeline_model_parallel_size."""
        return self.chunks if self.chunks > 1 else None


def start(layout: Layout = Layout(), compiled: bool = False) -> None:  # noqa: B008 - immutable
    """Stand-ins and Megatron's process groups; may be called again with another layout.

    compiled: with torch.compile where Megatron uses it (fused SwiGLU, expert bias), which takes ten seconds."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    megatron_cpu.install()
    torch.compiler.set_stance("default" if compiled else "force_eager")
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.virtual,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
    )


def configuration(layout: Layout = Layout(), special: bool = True, **changes: Any) -> Any:  # noqa: B008 - immutable
    from megatron.core.transformer.transformer_config import TransformerConfig

    from torchtitan_ext.adapters.megatron import SpecializedConfig

    values: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_ffn_hidden_size": 24,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "normalization": "RMSNorm",
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.tp > 1,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.virtual,
        "pipeline_dtype": torch.float32,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": 1,
    }
    return (SpecializedConfig if special else TransformerConfig)(**values | changes)


def block_spec(config: Any, special: bool, grouped: bool, chunk: int | None = None) -> Any:
    """Megatron's own spec for these experts, with the adapter's classes if special."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from torchtitan_ext.adapters.megatron import layer_spec, specialized

    parallel, config.sequence_parallel = config.sequence_parallel, False  # its norm would refuse
    if special and not grouped:
        spec = layer_spec(config, chunk)
    else:
        spec = get_gpt_decoder_block_spec(config, False, normalization=config.normalization, vp_stage=chunk)
        spec = with_grouped_experts(spec) if grouped else spec
        spec = specialized(spec) if special else spec
    config.sequence_parallel = parallel
    if not parallel:
        return spec
    norm = megatron_cpu.SequenceParallelNorm
    layers = [
        dataclasses.replace(
            layer, submodules=dataclasses.replace(layer.submodules, input_layernorm=norm, pre_mlp_layernorm=norm)
        )
        for layer in spec.layer_specs
    ]
    return dataclasses.replace(spec, layer_norm=norm, layer_specs=layers)


def with_grouped_experts(spec: Any) -> Any:
    """TEGroupedMLP in place of SequentialMLP, with a grouped linear layer of PyTorch's operations."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import experts
    from megatron.core.transformer.spec_utils import ModuleSpec

    linear = {"linear_fc1": megatron_cpu.GroupedLinear, "linear_fc2": megatron_cpu.GroupedLinear}

    def changed(layer: Any) -> Any:
        mlp = layer.submodules.mlp
        if isinstance(mlp, functools.partial):
            own: Any = functools.partial(experts.TEGroupedMLP, submodules=experts.GroupedMLPSubmodules(**linear))
            inner = dataclasses.replace(mlp.keywords["submodules"], experts=own)
            mlp = functools.partial(mlp.func, **{**mlp.keywords, "submodules": inner})
        else:
            own = ModuleSpec(module=experts.TEGroupedMLP, submodules=MLPSubmodules(**linear))
            mlp = dataclasses.replace(mlp, submodules=dataclasses.replace(mlp.submodules, experts=own))
        return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, mlp=mlp))

    return dataclasses.replace(spec, layer_specs=[changed(layer) for layer in spec.layer_specs])


def build(config: Any, special: bool = True, grouped: bool = False, chunk: int | None = None) -> Any:
    """A GPTModel, or a chunk of this pipeline stage of one. Routers and experts are scaled up, so that the losses are not
    near 0."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    where: dict[str, Any] = {"ignore_virtual": chunk is None, "vp_stage": chunk}
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, special, grouped, chunk),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        vp_stage=chunk,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2.0 if "router" in name else 20.0 if "experts" in name else 1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):  # moves the choice of experts, and nothing else
                buffer.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    return model


def batch(sequences: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions and the causal mask of some of the SEQUENCES sequences."""
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(3))[sequences]
    positions = torch.arange(LENGTH).expand(len(sequences), LENGTH)
    return ids, positions, torch.ones(len(sequences), 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)


def counted(sequences: list[int], padded: bool) -> Tensor:
    """(B, S), True where a token counts."""
    lengths = torch.tensor(LENGTHS if padded else [LENGTH] * SEQUENCES)[sequences]
    return torch.arange(LENGTH)[None] < lengths[:, None]


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def global_name(name: str, first_layer: int, first_expert: int) -> str:
    """The name that a parameter of this pipeline stage and expert-parallel rank has in the whole model."""
    name = re.sub(r"decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{int(m[1]) + first_layer}", name)
    name = re.sub(r"local_experts\.(\d+)", lambda m: f"local_experts.{int(m[1]) + first_expert}", name)
    return re.sub(r"(experts\.linear_fc[12]\.weight)(\d+)", lambda m: f"{m[1]}{int(m[2]) + first_expert}", name)


class Whole:
    """Parameters of this rank as parts of those of the whole model."""

    def __init__(self, model: Any, layout: Layout) -> None:
        from megatron.core import parallel_state

        self.layout, self.tp_rank = layout, parallel_state.get_tensor_model_parallel_rank()
        first_layer = model.decoder.layers[0].layer_number - 1
        first_expert = EXPERTS // layout.ep * parallel_state.get_expert_model_parallel_rank()
        self.names = {name: global_name(name, first_layer, first_expert) for name, _ in model.named_parameters()}

    def part(self, name: str, parameter: Tensor, whole: dict[str, Tensor]) -> Tensor:
        full = whole[self.names[name]]
        if full.shape == parameter.shape:
            return full
        return full.chunk(self.layout.tp, getattr(parameter, "partition_dim", 0))[self.tp_rank]


def logged(config: Any, microbatches: int) -> dict[str, float]:
    """Sums over layers of what was recorded, by the functions that Megatron-LM's loop calls; clears it."""
    totals: dict[str, Any] = {}
    words: dict[str, Any] = {"num_layers": config.num_layers, "moe_layer_freq": config.moe_layer_freq}
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().report(1 / microbatches, 1, total_loss_dict=totals, **words)
    except ImportError:
        from megatron.core.transformer.moe.moe_utils import track_moe_metrics

        track_moe_metrics(1 / microbatches, 1, total_loss_dict=totals, **words)
    frequency = config.moe_layer_freq
    layers = len(range(0, config.num_layers, frequency)) if isinstance(frequency, int) else sum(frequency)
    return {name.removesuffix("_loss"): float(value) * layers for name, value in totals.items()}


def eightfold(loss: Tensor) -> Tensor:
    """A loss scale, as fp16 has one."""
    return loss * 8


def micro_steps(data_parallel: int, microbatch: int) -> list[list[int]]:
    """The sequences of each micro-step, over all data-parallel ranks."""
    size = data_parallel * microbatch
    return [list(range(first, first + size)) for first in range(0, SEQUENCES, size)]


class Step(NamedTuple):
    """What a rank has after the gradients of one step."""

    errors: dict[str, float]
    """By parameter: distance of the gradient from the expected one, relative to its norm."""
    values: dict[str, float]


def scheduled_step(
    layout: Layout,
    whole: dict[str, Tensor],
    expected: dict[str, Tensor],
    microbatch: int,
    grouped: bool,
    padded: bool,
    **changes: Any,
) -> Step:
    """A step's gradients by Megatron's schedule, its DDP and `finalize_model_grads`, compared with the expected ones.

    whole: parameters of the whole model. microbatch: sequences in a micro-batch; the SEQUENCES sequences are dealt out to
    micro-steps, then to data-parallel ranks."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # A backward pass outside the schedule has set a scale of another shape, which the schedule can't write to.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    config = configuration(layout, **changes)
    chunks = [None] if layout.virtual is None else range(layout.chunks)
    models = [build(config, grouped=grouped, chunk=chunk) for chunk in chunks]
    parts = [Whole(model, layout) for model in models]
    with torch.no_grad():
        for model, part in zip(models, parts, strict=True):
            for name, parameter in model.named_parameters():
                parameter.copy_(part.part(name, parameter, whole))
    settings = DistributedDataParallelConfig(overlap_grad_reduce=False)
    wrapped = [DistributedDataParallel(config, settings, model) for model in models]
    config.finalize_model_grads_func = finalize_model_grads
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    steps = SEQUENCES // (ranks * microbatch)
    mine = [[(m * ranks + rank) * microbatch + b for b in range(microbatch)] for m in range(steps)]
    data = [iter(mine) for _ in chunks]

    def forward(data: Any, model: Any) -> Any:
        sequences = next(data)
        ids, positions, mask = batch(sequences)
        keep = counted(sequences, padded)
        words = {"padding_mask": ~keep} if padded else {}

        def loss(out: Tensor) -> Any:
            return (out * keep).sum(), keep.sum().to(torch.int), {"lm": out.detach().mean()}

        return model(ids, positions, mask, labels=ids, **words), loss

    for model in wrapped:
        model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=data if layout.virtual else data[0],
        model=wrapped,
        num_microbatches=steps,
        seq_length=LENGTH,
        micro_batch_size=microbatch,
        forward_only=False,
    )
    scale = 1.0 if config.grad_scale_func is None else float(config.grad_scale_func(torch.ones(())))
    errors = {}
    for model, part in zip(models, parts, strict=True):
        for name, parameter in model.named_parameters():
            reference = part.part(name, parameter, expected) * scale
            distance = (parameter.main_grad - reference).norm() / (reference.norm() + 1e-12)
            errors[part.names[name]] = float(distance)
    return Step(errors, logged(config, steps))
