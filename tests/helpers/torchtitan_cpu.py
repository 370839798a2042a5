"""TorchTitan on a CPU with gloo, its Trainer included. `python -m tests.helpers.torchtitan_cpu ARGUMENTS` is its `train.py`.

TorchTitan asks CUDA for its device, that device's memory and its index. `prepare` answers for the CPU; no file of TorchTitan is
changed. Call it before TorchTitan is imported.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils


def prepare() -> None:
    """Makes the CPU the device of every TorchTitan module that is imported from now on."""
    torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[assignment]
    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "get_device_name": lambda _=None: "cpu",
        "get_device_properties": lambda _=None: SimpleNamespace(total_memory=1 << 33),
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda _=None: {},
    }
    for name, answer in answers.items():
        setattr(torch.cpu, name, answer)

    if not hasattr(
        torch.distributed, "set_timeout"
    ):  # newer than torch 2.13; the Trainer calls it after its first step
        torch.distributed.set_timeout = lambda *_: None  # type: ignore[attr-defined]

    from torch.distributed.fsdp import FSDPModule
    from torchtitan.distributed import fsdp

    undivided = fsdp.disable_fsdp_gradient_division

    def undivided_with_gloo(model: torch.nn.Module) -> None:
        undivided(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo can't multiply before it sums

    fsdp.disable_fsdp_gradient_division = undivided_with_gloo


def assets(folder: Path) -> None:
    """The files that TorchTitan's debug configurations read, relative to the current directory."""
    from tests.helpers.byte_level import END, byte_level

    tokenizer, texts = folder / "tests/assets/tokenizer", folder / "tests/assets/c4_test"
    for made in (tokenizer, texts):
        made.mkdir(parents=True)
    byte_level().save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": END, "eos_token": END}))
    rows = [json.dumps({"text": f"Line {i} of the text: {'the quick brown fox ' * (i % 7 + 3)}"}) for i in range(200)]
    (texts / "data.json").write_text("\n".join(rows))


def qwen3_small() -> Any:
    """A configuration for `--module tests.helpers.torchtitan_cpu --config qwen3_small`."""
    from tests.helpers.torchtitan_models import configuration

    config = configuration("qwen3", layers=2)
    config.training.steps, config.training.local_batch_size, config.training.seq_len = 3, 2, 64
    config.metrics.enable_tensorboard = True
    return config


if __name__ == "__main__":
    prepare()
    from torchtitan.train import main

    main()
