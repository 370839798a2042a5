"""Loads the model and the tokenizer, and finds the parameters that adapters go on."""

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titan_moe.errors import UserError
from titan_moe.finetune.tables import FinetuneConfig, Lora, Model
from titan_moe.runtime.json_file import one_line
from titan_moe.runtime.optional import optional

log = logging.getLogger("titan_moe")


def load_model(config: FinetuneConfig, checkpoint: Path | None = None) -> Any:
    """The model in its training type: float32 for full fine-tuning, `model.dtype` with adapters. Raises UserError.

    checkpoint: of a run that trains all parameters, to take the weights from. Trainer's own resumption would leave the
    experts at what they are (transformers 5.24): a checkpoint has a tensor per expert, and it looks for the fused ones.
    Code that comes with a model is never run. A file that lacks a tensor of the model, or has one too many, is refused:
    Transformers would train random numbers in its place."""
    transformers = optional("transformers", "hf")
    model = config.model
    if checkpoint is not None:
        model = model.model_copy(update={"path": str(checkpoint), "revision": ""})
    dtype = getattr(torch, model.dtype) if config.lora.rank else torch.float32
    found, info = from_pretrained(
        transformers.AutoModelForCausalLM,
        model,
        dtype=dtype,
        attn_implementation=model.attention,
        output_loading_info=True,
    )
    for problem, names in info.items():
        if names:
            example = str(sorted(map(str, names))[0])[:120]
            raise UserError(
                f"model.path = {model.path!r}: {problem.replace('_', ' ')} in its files ({len(names)}), such as {example}; "
                "they are not of the architecture in its config.json, or not complete"
            )
    if not routed_experts(found):
        kind = found.config.model_type
        raise UserError(f"model.path = {model.path!r}: {kind} has no experts that Transformers' MoE interface computes")
    found.set_experts_implementation(model.experts)
    return found


def load_tokenizer(config: FinetuneConfig) -> Any:
    """The model's tokenizer, with the chat template that the configuration names. Raises UserError."""
    transformers = optional("transformers", "hf")
    tokenizer = from_pretrained(transformers.AutoTokenizer, config.model)
    if tokenizer.eos_token is None:
        raise UserError(f"model.path = {config.model.path!r}: its tokenizer has no end-of-text symbol (eos_token)")
    if config.data.chat_template:
        path = Path(config.data.chat_template)
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"data.chat_template = {str(path)!r}: can't be read: {one_line(error)}") from error
    return tokenizer


def from_pretrained(kind: Any, model: Model, **options: Any) -> Any:
    """`kind.from_pretrained` of a directory or of a repository of the hub. Raises UserError."""
    path = Path(model.path)
    local = path.is_dir()
    if not local and (path.exists() or model.path.count("/") != 1 or model.path.startswith((".", "/", "~"))):
        raise UserError(
            f"model.path = {model.path!r}: no such directory, and no name of a model on the hub (owner/name)"
        )
    options |= {"revision": model.revision} if model.revision and not local else {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return kind.from_pretrained(model.path, trust_remote_code=False, local_files_only=local, **options)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise
        where = "" if local else "no such directory, and the hub gives: "
        raise UserError(f"model.path = {model.path!r}: {where}{one_line(error)}") from error
    except Exception as error:  # of safetensors and of huggingface_hub, which have types of their own
        if type(error).__module__.split(".")[0] not in ("safetensors_rust", "safetensors", "huggingface_hub", "httpx"):
            raise
        raise UserError(f"model.path = {model.path!r}: {one_line(error)}") from error


def routed_experts(model: nn.Module) -> list[str]:
    """Names of the modules that hold routed experts, their weights in one tensor per projection."""
    return [
        name for name, module in model.named_modules() if hasattr(module, "_apply_gate") and hasattr(module, "has_gate")
    ]


def lora_config(model: nn.Module, lora: Lora) -> Any:
    """PEFT's configuration for these adapters. Raises UserError when the model has no such part."""
    peft = optional("peft", "hf")
    experts = routed_experts(model)
    parameters = (
        [f"{name}.{part}" for name in experts for part in ("gate_up_proj", "down_proj")] if lora.experts else []
    )
    modules = []
    routers = router_weights(model)
    if lora.router:
        parameters += [name for name, linear in routers if not linear]
        modules += [name.removesuffix(".weight") for name, linear in routers if linear]
        if not routers:
            raise UserError("lora.router = true: no router was found beside the experts; set it to false")
    skipped = {name.removesuffix(".weight") for name, _ in routers}
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and name not in skipped:
            in_attention = any("attn" in part or "attention" in part for part in name.split("."))
            if in_attention and lora.attention:
                modules.append(name)
            elif not in_attention and lora.feed_forward:
                # By its weight: PEFT takes modules named gate_proj, up_proj or down_proj for experts of an older Transformers.
                parameters.append(f"{name}.weight")
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )


def router_weights(model: nn.Module) -> list[tuple[str, bool]]:
    """Names of the routers' weights, and whether each belongs to an `nn.Linear`, which PEFT takes by its module.

    A router is a module of the class from which Transformers records `router_logits`."""
    recorded = [getattr(type(module), "_can_record_outputs", None) or {} for module in model.modules()]
    entries = [entry["router_logits"] for entry in recorded if "router_logits" in entry]
    kinds = tuple({getattr(entry, "target_class", entry) for entry in entries})
    found = []
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            found += [
                (f"{name}.{own}", False) for own, weight in module.named_parameters(recurse=False) if weight.dim() == 2
            ]
            found += [
                (f"{name}.{own}.weight", True) for own, inner in module.named_children() if isinstance(inner, nn.Linear)
            ]
    return found
