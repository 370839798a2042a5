"""One fine-tuning run, from checked inputs to the saved model."""

import logging
import warnings
from typing import Any

import torch.distributed as dist

from titan_moe.errors import UserError
from titan_moe.finetune.arguments import trainer_options
from titan_moe.finetune.inputs import Inputs, open_run
from titan_moe.finetune.model import load_model, load_tokenizer, lora_config
from titan_moe.finetune.save import save_result
from titan_moe.finetune.tables import FinetuneConfig
from titan_moe.parallel.mesh import from_first, limit_waiting, start_processes, stop_processes
from titan_moe.runtime.device import pick_device
from titan_moe.runtime.log import start_log
from titan_moe.runtime.optional import optional
from titan_moe.runtime.stopping import Stopping

log = logging.getLogger("titan_moe")


def finetune(config: FinetuneConfig, inputs: Inputs) -> int:
    """Trains until the last step or a signal. Returns the exit status. Raises UserError, TrainingError."""
    quiet()
    device = pick_device()
    start_processes(device, config.parallelism.timeout_seconds)
    from_first(lambda: open_run(config, inputs))
    limit_waiting(config.parallelism.timeout_seconds)
    run_dir = inputs.run_dir
    start_log(run_dir.log, run_dir.rank)
    tokenizer = load_tokenizer(config)
    check_template(config, inputs, tokenizer)
    stopping = Stopping(dist.group.WORLD if dist.is_initialized() else None, device)
    trainer = build_trainer(config, inputs, tokenizer, stopping)
    with stopping.signals():
        status = trainer.run(inputs.checkpoint)
    if status == 0:
        for line in save_result(config, trainer, tokenizer, run_dir.path, run_dir.rank == 0):
            log.info(line)
    run_dir.close()
    stop_processes()
    return status


def quiet() -> None:
    """Turns off the packages' progress bars, their notes on coming changes, and all that they log but errors."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate|peft)\.")
    for name in ("transformers", "datasets"):
        logs = optional(f"{name}.utils.logging", "hf")
        logs.set_verbosity_error()
        logs.disable_progress_bar()
    for name in ("trl", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_template(config: FinetuneConfig, inputs: Inputs, tokenizer: Any) -> None:
    """Raises UserError when messages can't be made tokens, or their assistant's part can't be told."""
    if not inputs.training.conversational:
        return
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path = {config.model.path!r}: its tokenizer has no chat template, which messages need; give one with "
            "data.chat_template"
        )
    if inputs.training.kind != "chat" or not config.data.completion_only:
        return
    templates = optional("trl.chat_template_utils", "hf")
    if templates.has_generation_markers(tokenizer.chat_template):
        return
    try:
        templates.get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(
            "data.completion_only = true: the chat template does not mark what the assistant says, and TRL has no marked form "
            "of it; give one with {% generation %} ... {% endgeneration %} in data.chat_template, or set "
            "data.completion_only to false"
        ) from error


def build_trainer(config: FinetuneConfig, inputs: Inputs, tokenizer: Any, stopping: Stopping) -> Any:
    """The trainer with its model, rows and callbacks. Raises UserError."""
    trl, datasets = optional("trl", "hf"), optional("datasets", "hf")
    from titan_moe.finetune.trainer import FineTuner

    world = dist.get_world_size() if dist.is_initialized() else 1
    model = load_model(config, None if config.lora.rank else inputs.checkpoint)
    options = trainer_options(config, inputs.training, inputs.validation, inputs.run_dir.checkpoints, world)
    adapters = lora_config(model, config.lora) if config.lora.rank else None
    training = datasets.Dataset.from_list(inputs.training.rows)
    validation = datasets.Dataset.from_list(inputs.validation.rows) if inputs.validation is not None else None
    try:
        return FineTuner(
            config, inputs, stopping, model, trl.SFTConfig(**options), training, validation, tokenizer, adapters
        )
    except ImportError as error:  # flash attention, say
        raise UserError(f"model.attention = {config.model.attention!r}: {error}") from error
    except ValueError as error:
        if not str(error).startswith("attach: "):
            raise
        raise UserError(f"model.path = {config.model.path!r} with [regularizers]: {error}") from error
