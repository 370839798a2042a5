"""The terms inside the training loops of Transformers and TRL: logs, and the step by which weights warm up.

Plain `Trainer` uses the model's own loss, which `attach` has extended; `TermsCallback` is all it needs:

    attached = attach(model, {"sp": 2e-3, "cp": 1e-3})
    Trainer(model, ..., callbacks=[TermsCallback(attached)])

TRL's trainers compute their loss from log-probabilities and never read the model's own: without a subclass the terms have no
effect. `Regularized` makes one of any of them; `torchtitan_ext.adapters.trl` has `RegularizedSFTTrainer`:

    class RegularizedDPOTrainer(Regularized, DPOTrainer): ...
    RegularizedDPOTrainer(model, ..., regularizers={"sp": 2e-3, "cp": 1e-3})

Importing this needs transformers.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from torchtitan_ext.adapters.transformers import attach

log = logging.getLogger("torchtitan_ext")
NO_EFFECT = (
    "the attached terms have no effect: this trainer computes its loss from log-probabilities and never reads the model's own; "
    "use torchtitan_ext.adapters.trl.RegularizedSFTTrainer, or `class Mine(Regularized, DPOTrainer)` with "
    "torchtitan_ext.adapters.trainer.Regularized"
)


class TermsCallback(TrainerCallback):
    """Logs the terms and measures of the last step, and gives the terms the trainer's step before its first micro-batch.

    Warns when the trainer is one whose loss the terms do not reach."""

    def __init__(self, attached: Any, added: bool = False) -> None:
        """attached: what `attach` returned. added: whether the trainer adds `attached.penalty` itself."""
        self.attached, self.added = attached, added
        self.hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:  # noqa: ARG002
        if not self.added:
            self.hook = causal_model(model).register_forward_hook(self.warn)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.stop_watching()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.attached.step = state.global_step + 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:  # noqa: ARG002
        if logs is None or "loss" not in logs or self.added:
            return  # of a validation or of the end; `Regularized` adds them before this is called
        values = step_metrics(self.attached)
        logs |= values
        state.log_history[-1] |= values

    def warn(self, module: nn.Module, args: Any, outputs: Any) -> None:  # noqa: ARG002 - a hook's signature
        """A forward hook: warns if this was the first training forward of TRL's output head."""
        if module.training and torch.is_grad_enabled():
            if getattr(outputs, "log_probs", None) is not None:
                log.warning(NO_EFFECT)
            self.stop_watching()

    def stop_watching(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None


def step_metrics(attached: Any) -> dict[str, float]:
    """Terms and measures of the last step over all ranks, which must all call this."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    values: dict[str, float] = attached.metrics(group=dist.group.WORLD if several else None)
    return values


def causal_model(model: Any) -> nn.Module:
    """The Transformers model inside the wrappers of PEFT, DDP and torch.compile."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


class Regularized:
    """Mixin for TRL's trainers, before the trainer in the list of bases: attaches the terms and adds them to the loss.

    The tokens that count are those whose labels the trainer gives the model: completions. Weights of tokens are 1 /
    `num_items_in_batch` where the trainer counts the labels of the global batch (SFT); else 1 / (labels of the micro-batch),
    as that trainer's own loss is a mean over micro-batches too (DPO, KTO, GRPO)."""

    bare_name = "loss_without_terms"
    """In the logs: the trainer's own loss."""

    def __init__(
        self,
        *args: Any,
        regularizers: Mapping[str, Any],
        measure: Sequence[str] = (),
        seed: int = 0,
        score: str | None = None,
        **kwargs: Any,
    ) -> None:
        """regularizers, measure, seed, score: as for `attach`. The other arguments are the trainer's. Raises ValueError for
        those that can't work."""
        given = kwargs["model"] if "model" in kwargs else args[0] if args else None
        attached = None
        if isinstance(given, nn.Module):  # before the trainer puts adapters on it; a name is loaded by the trainer
            attached = attach(given, regularizers, measure=measure, seed=seed, score=score, add_to_loss=False)
        try:
            super().__init__(*args, **kwargs)
            trainer: Any = self
            if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
                raise ValueError(
                    "compute_loss_func and label smoothing run the model twice for a loss; use neither with terms"
                )
        except BaseException:
            if attached is not None:
                attached.detach()
            raise
        if attached is None:
            model = trainer.model
            attached = attach(model, regularizers, measure=measure, seed=seed, score=score, add_to_loss=False)
        self.attached = attached
        self.penalties: list[Tensor] = []
        self.items: Tensor | int | None = None
        self.sums: dict[str, Tensor] = {}
        causal_model(trainer.model).register_forward_hook(self.collect, with_kwargs=True)
        trainer.add_callback(TermsCallback(self.attached, added=True))

    def collect(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:  # noqa: ARG002
        """A forward hook, called after that of `attach`: keeps the terms of a forward pass that the loss is made of.

        Passes without gradient are of a reference model, of generation, or of a validation."""
        labels = kwargs.get("labels")
        if (
            labels is None
            or not module.training
            or not torch.is_grad_enabled()
            or kwargs.get("shift_labels") is not None
        ):
            return
        self.penalties.append(self.attached.penalty(labels, self.items))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss plus the weighted terms."""
        trainer: Any = self
        scaled = trainer.loss_is_scaled_for_ga
        self.penalties, self.items = [], num_items_in_batch if scaled is None else None
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not self.penalties:
            return result
        loss = result[0] if return_outputs else result
        extra = torch.stack(self.penalties).sum()
        steps = trainer.current_gradient_accumulation_steps
        if self.items is None:
            extra = extra / len(self.penalties)
            if scaled:  # the trainer has divided its loss by the micro-batches, and nothing does so later
                extra = extra / steps
        elif trainer.args.average_tokens_across_devices:
            extra = (
                extra * trainer.accelerator.num_processes
            )  # as the trainer's loss: gradients are averaged over ranks
        later = 1 if scaled or (self.items is not None and trainer.model_accepts_loss_kwargs) else steps
        self.add({self.bare_name: loss / later, "penalty": extra / later})
        return (loss + extra, result[1]) if return_outputs else loss + extra

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds a micro-batch's part to what the next log shows."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value.detach())) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss without the terms, the terms and the measures to the log of training steps."""
        if "loss" in logs:
            logs |= self.terms_of_step()
        super().log(logs, start_time)  # type: ignore[misc]

    def terms_of_step(self) -> dict[str, float]:
        """The trainer's loss and the weighted terms as means over the steps since the last log, as its own `loss` is; the
        terms and measures of the last step."""
        trainer: Any = self
        steps = max(trainer.state.global_step - trainer._globalstep_last_logged, 1)
        sums, self.sums = self.sums, {}
        means = {name: trainer.accelerator.reduce(value, "mean").item() / steps for name, value in sums.items()}
        return means | step_metrics(self.attached)
