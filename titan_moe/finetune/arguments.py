"""From our configuration to TRL's `SFTConfig`."""

from pathlib import Path
from typing import Any

import torch

from titan_moe.finetune.rows import Rows
from titan_moe.finetune.tables import FinetuneConfig

SCHEDULES = {"cosine": "cosine", "linear": "linear", "none": "constant_with_warmup"}


def trainer_options(
    config: FinetuneConfig, rows: Rows, validation: Rows | None, folder: Path, world: int
) -> dict[str, Any]:
    """The arguments of `SFTConfig`. folder: of the checkpoints. world: number of ranks.

    Transformers' own load-balancing loss is off in every case (`router_aux_loss_coef`): it pools all layers, is added whole to
    every micro-batch, and would come on top of our lb. Reentrant checkpointing is off because it would give the terms
    wrong gradients."""
    training, optimizer, schedule = config.training, config.optimizer, config.lr_scheduler
    chat = rows.kind == "chat"
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": training.microbatch_size,
        "per_device_eval_batch_size": training.microbatch_size,
        "gradient_accumulation_steps": training.batch_size // (training.microbatch_size * world),
        "num_train_epochs": training.epochs,
        "max_steps": training.steps or -1,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "learning_rate": optimizer.lr,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "lr_scheduler_type": SCHEDULES[schedule.decay],
        "warmup_steps": schedule.warmup_fraction if schedule.warmup_fraction < 1 else 1.0 - 1e-9,
        "seed": config.job.seed,
        "bf16": config.model.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": config.activation_checkpoint.enable,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.activation_checkpoint.enable else None,
        "max_length": config.data.seq_len,
        "packing": config.data.packing != "none",
        "packing_strategy": config.data.packing if config.data.packing != "none" else "bfd",
        "assistant_only_loss": chat and config.data.completion_only,
        "completion_only_loss": config.data.completion_only if not chat else None,
        "router_aux_loss_coef": 0.0,
        "average_tokens_across_devices": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.checkpoint.interval else "no",
        "save_steps": config.checkpoint.interval or 1,
        "save_total_limit": config.checkpoint.keep,
        "eval_strategy": "steps" if validation is not None and config.validation.interval else "no",
        "eval_steps": config.validation.interval or 1,
        "report_to": [],
        "disable_tqdm": True,
        "push_to_hub": False,
    }
    if world > 1 and config.parallelism.shard:
        # Version 2 is `fully_shard`. Checkpoints are whole, so that any number of ranks goes on from them.
        options["fsdp"] = True
        options["fsdp_config"] = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "reshard_after_forward": True}
    elif world > 1:
        options["ddp_find_unused_parameters"] = False
    return options
