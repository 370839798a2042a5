"""The balancing bias of routers that have one: moved after every optimizer step, which Transformers itself never does.

With adapters the bias is no part of what PEFT saves. So checkpoints keep it in trainer_state.json, and the result in a file
beside the adapters.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerCallback

from titan_moe.config.tables import Balancer
from titan_moe.errors import UserError
from titan_moe.finetune.inputs import STATE
from titan_moe.runtime.json_file import read_json
from titan_moe.runtime.optional import optional
from torchtitan_ext.balancer import update_expert_bias

NAME = "e_score_correction_bias"
FILE = "balancing_bias.safetensors"


def biases_of(model: nn.Module) -> dict[str, Tensor]:
    """The balancing bias of every router, by the name it has in the model without adapters.

    Only buffers: a parameter (ERNIE's) is sharded over ranks as all others are."""
    return {name.replace(".base_layer", ""): bias for name, bias in model.named_buffers() if name.endswith(NAME)}


class Balancing(TrainerCallback, ExportableState):
    """b_e += rate * sign(mean of the counts - c_e) after every optimizer step (Wang et al. 2408.15664)."""

    def __init__(self, attached: Any, options: Balancer, checkpoint: Path | None) -> None:
        """attached: what `attach` returned; it counts assignments of labelled tokens over a step. checkpoint: to go on from.

        Raises UserError for a model without a balancing bias."""
        self.attached, self.options = attached, options
        self.biases = biases_of(attached.model)
        layers = len(attached.structure.layers)
        if len(self.biases) != layers or any(bias.dtype != torch.float32 for bias in self.biases.values()):
            kind = attached.model.config.model_type
            raise UserError(
                f"balancer.rate = {options.rate}: {kind} has {len(self.biases)} balancing biases ({NAME}) in float32 in its "
                f"{layers} MoE layers; set it to 0, and regularizers.lb.weight"
            )
        if checkpoint is not None:
            stored = read_json(checkpoint / STATE)["stateful_callbacks"][type(self).__name__]["attributes"]["biases"]
            for name, values in stored.items():
                self.biases[name].copy_(torch.tensor(values).view_as(self.biases[name]))

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps. A float32 is the same number after a trip through JSON."""
        return {
            "args": {},
            "attributes": {"biases": {name: value.flatten().tolist() for name, value in self.biases.items()}},
        }

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the interface
        counts_LE = self.attached.assignments(dist.group.WORLD if dist.is_initialized() else None)
        for bias, counts_E in zip(self.biases.values(), counts_LE, strict=True):
            update_expert_bias(bias.view(-1), counts_E, self.options.rate, self.options.center)


def save_biases(model: nn.Module, folder: Path) -> None:
    """Writes the biases of a model, if it has any, beside its adapters."""
    found = {name: value.detach().clone() for name, value in biases_of(model).items()}
    if found:
        optional("safetensors.torch", "hf").save_file(found, folder / FILE)


@torch.no_grad()
def load_biases(model: nn.Module, folder: Path) -> None:
    """Sets the biases of a model without adapters to those that `save_biases` wrote."""
    if (folder / FILE).exists():
        stored = optional("safetensors.torch", "hf").load_file(folder / FILE)
        for name, bias in biases_of(model).items():
            bias.copy_(stored[name])
