"""What a finished run leaves beside its checkpoints: the model, or the adapters and if asked the merged model."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_moe.checkpoint.run_dir import remove
from titan_moe.finetune.balancing import load_biases, save_biases
from titan_moe.finetune.model import load_model
from titan_moe.finetune.tables import FinetuneConfig
from titan_moe.runtime.files import refuse_link
from titan_moe.runtime.optional import optional
from titan_moe.weights.target import written_beside

MODEL, ADAPTER = "model", "adapter"


def save_result(config: FinetuneConfig, trainer: Any, tokenizer: Any, run: Path, first: bool) -> list[str]:
    """Writes RUN/model (all parameters), or RUN/adapter and with `lora.merge` RUN/model. Returns what to tell the user.

    Collective: ranks gather sharded parameters; the first one writes. Raises UserError."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model)  # of sharded parameters whole tensors, on rank 0 only
    if not first:
        return []
    if not config.lora.rank:
        write_model(model, run / MODEL, tokenizer, state, config.model.dtype)
        return [f"{run / MODEL}: the model, in {config.model.dtype}"]
    write(model, run / ADAPTER, tokenizer, state)
    save_biases(model.get_base_model(), run / ADAPTER)
    lines = [f"{run / ADAPTER}: the adapters, for peft.PeftModel.from_pretrained"]
    if config.lora.merge:
        merge(config, run, tokenizer)
        lines.append(f"{run / MODEL}: the model with the adapters added to its weights, in {config.model.dtype}")
    return lines


def merge(config: FinetuneConfig, run: Path, tokenizer: Any) -> None:
    """Adds RUN/adapter to the weights of the model that it was trained on, and writes RUN/model.

    The model is loaded once more: the one that was trained may be sharded over ranks."""
    peft = optional("peft", "hf")
    merged = peft.PeftModel.from_pretrained(load_model(config), str(run / ADAPTER)).merge_and_unload()
    load_biases(merged, run / ADAPTER)
    write_model(merged, run / MODEL, tokenizer, merged.state_dict(), config.model.dtype)


def write_model(model: Any, path: Path, tokenizer: Any, state: dict[str, Tensor], dtype: str) -> None:
    """A directory for Transformers with tensors of type `dtype`, but for those that Transformers keeps in float32."""
    names = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    state = {
        name: value.to(getattr(torch, dtype))
        if value.is_floating_point() and not any(n in name for n in names)
        else value
        for name, value in state.items()
    }
    write(model, path, tokenizer, state, {"dtype": dtype})


def write(
    model: Any, path: Path, tokenizer: Any, state: dict[str, Tensor], config: dict[str, str] | None = None
) -> None:
    """Replaces a directory by what `save_pretrained` writes. config: keys of config.json that are set after it."""
    refuse_link(path)
    if path.exists():
        remove(path)
    with written_beside(path, is_folder=True) as folder:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        if config:
            file = folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config, indent=2) + "\n", encoding="utf-8")
