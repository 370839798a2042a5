"""TRL's SFTTrainer with the loss terms, this project's rows of metrics, and an orderly stop at a signal."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig

from titan_moe.checkpoint.run_dir import read_rows
from titan_moe.errors import TrainingError, UserError
from titan_moe.finetune.balancing import Balancing
from titan_moe.finetune.inputs import Inputs
from titan_moe.finetune.tables import FinetuneConfig
from titan_moe.runtime.device import peak_memory_gib
from titan_moe.runtime.stopping import Stopping
from titan_moe.train.trackers import open_trackers
from torchtitan_ext.adapters.trl import RegularizedSFTTrainer

log = logging.getLogger("titan_moe")
DIRECT = ("loss", "ce", "grad_norm")
PREFIXES = ("reg/", "moe/")


class FineTuner(RegularizedSFTTrainer):
    """The trainer of `titan-moe finetune`."""

    eval_dataset: Any

    def __init__(
        self,
        config: FinetuneConfig,
        inputs: Inputs,
        stopping: Stopping,
        model: Any,
        arguments: SFTConfig,
        training: Any,
        validation: Any,
        tokenizer: Any,
        adapters: Any,
    ) -> None:
        """training, validation: `datasets.Dataset` of rows; the latter may be None. adapters: PEFT's configuration, or None."""
        self.rows = Rows(config, inputs, stopping)
        super().__init__(
            model,
            arguments,
            regularizers={name: table for name, table in config.regularizers.options().items() if table.weight > 0},
            measure=config.regularizers.measure,
            seed=config.job.seed,
            train_dataset=training,
            eval_dataset=validation,
            processing_class=tokenizer,
            peft_config=adapters,
            callbacks=[self.rows],
        )
        if config.balancer.rate:
            self.add_callback(Balancing(self.attached, config.balancer, inputs.checkpoint))
        self.remove_callback(PrinterCallback)  # prints every log to stdout
        self.config, self.stopping = config, stopping
        for name, dataset in (("data.train", self.train_dataset), ("data.validation", self.eval_dataset)):
            if dataset is not None and not len(dataset):
                raise UserError(
                    f"{name}: no row has a token to learn within data.seq_len = {config.data.seq_len} tokens"
                )
        self.validation_bytes = 0
        if validation is not None:
            self.validation_bytes = labelled_bytes(self.eval_dataset, tokenizer)
            self.eval_dataset = filled(self.eval_dataset, arguments.per_device_eval_batch_size * arguments.world_size)
        self.validation_sums = torch.zeros(2, dtype=torch.float64)

    def run(self, checkpoint: Path | None) -> int:
        """Trains to the end or to a signal, after which everything is saved. Returns the exit status."""
        steps = self.total_steps()
        with open_trackers(
            self.rows.settings(steps), self.rows.folder, self.rows.first_step, self.is_world_process_zero()
        ) as rows:
            self.rows.trackers = rows
            self.announce(steps, checkpoint)
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if self.stopping.stop and self.state.global_step < steps:
                assert self.stopping.signal is not None
                log.info(f"stopped at step {self.state.global_step}; the same command goes on from there")
                return 128 + self.stopping.signal
            if self.eval_dataset is not None and self.rows.validated != self.state.global_step:
                self.evaluate()
        return 0

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        per_epoch = max(math.ceil(batches / self.args.gradient_accumulation_steps), 1)
        return math.ceil(self.args.num_train_epochs * per_epoch)

    def announce(self, steps: int, checkpoint: Path | None) -> None:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        what = f"adapters of rank {self.config.lora.rank}" if self.config.lora.rank else "all parameters"
        where = f"from {checkpoint}" if checkpoint else "a new run"
        log.info(
            f"{self.rows.folder}: {where}; {len(self.train_dataset):,} sequences, {steps:,} steps; {what}, {trained:,} numbers"
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            count = (inputs["labels"][..., 1:] != -100).sum().double()
            mean = (loss[0] if return_outputs else loss).detach().double()
            self.validation_sums += torch.stack([mean * count, count]).cpu()
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validates, and logs the mean over all labelled tokens; Trainer's own is a mean over batches."""
        self.validation_sums.zero_()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        nats, tokens = self.accelerator.reduce(self.validation_sums.to(self.args.device), "sum").tolist()
        self.rows.validation(self.state.global_step, nats, tokens, self.validation_bytes)
        return metrics


def filled(dataset: Any, multiple: int) -> Any:
    """The rows and some without labels, so that every rank gets equally many: accelerate would give rows twice."""
    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    row = dataset[0] | {"labels": [-100] * len(dataset[0]["input_ids"])}
    return concatenate_datasets([dataset, Dataset.from_list([row] * missing, features=dataset.features)])


def labelled_bytes(dataset: Any, tokenizer: Any) -> int:
    """UTF-8 bytes of the text that the validation loss is about, symbols such as the end of a turn not counted."""
    total = 0
    for row in dataset:
        text = tokenizer.decode([token for token in row["labels"] if token != -100], skip_special_tokens=True)
        total += len(text.encode("utf-8"))
    return total


class Rows(TrainerCallback):
    """Writes a row of metrics per step, and ends the run at a signal, saved."""

    def __init__(self, config: FinetuneConfig, inputs: Inputs, stopping: Stopping) -> None:
        self.config, self.stopping, self.folder = config, stopping, inputs.run_dir.path
        self.first_step = inputs.step
        before = read_rows(inputs.run_dir.metrics) if inputs.run_dir.metrics.exists() else []
        self.tokens_before = max((row["tokens"] for row in before if row["kind"] == "train"), default=0)
        self.trackers: list[Any] = []
        self.validated = 0
        self.tokens, self.began = self.tokens_before, time.perf_counter()

    def settings(self, steps: int) -> Any:
        """The configuration as trackers read it, with the number of steps in place of 0."""
        return self.config.model_copy(update={"training": self.config.training.model_copy(update={"steps": steps})})

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - Transformers' interface
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.stopping.vote():
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:  # noqa: ARG002
        if "loss" not in logs:
            return  # of a validation or of the end, see `validation`
        step, seconds = state.global_step, time.perf_counter() - self.began
        for name in (*DIRECT[1:], "loss", *(name for name in logs if name.startswith(PREFIXES))):
            if not math.isfinite(logs[name]):
                raise TrainingError(f"step {step}: {name} is not finite; the run goes on from its newest checkpoint")
        tokens = self.tokens_before + round(logs["num_tokens"])
        row = {"kind": "train", "step": step, "tokens": tokens, "loss": logs["loss"], "ce": logs["ce"]}
        row |= {name: value for name, value in logs.items() if name.startswith(PREFIXES)}
        row |= {"grad_norm": logs["grad_norm"], "lr": logs["learning_rate"]}
        row["tokens_per_second"] = (tokens - self.tokens) / seconds
        row |= {"step_seconds": seconds, "memory_gib": peak_memory_gib(self.stopping.device)}
        self.tokens = tokens
        self.write(row)

    def validation(self, step: int, nats: float, tokens: float, size: int) -> None:
        """Writes the row of a validation. nats: summed over `tokens` labelled tokens, whose text has `size` bytes."""
        self.validated, loss = step, nats / max(tokens, 1.0)
        bits = nats / math.log(2) / max(size, 1)
        row = {"kind": "validation", "step": step, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        self.write(row | {"bits_per_byte": bits})

    def write(self, row: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(row)
