"""Fine-tunes a Transformers MoE model on chats or on prompts with completions, with the loss terms added.

The work is done by TRL's SFTTrainer, PEFT (adapters) and accelerate (several ranks). The same command continues a run.

examples: titan-moe finetune --config finetune_qwen3_30b_a3b --model.path downloads/Qwen3-30B-A3B --data.train chats.jsonl
          torchrun --nproc-per-node 8 -m titan_moe.cli finetune --config my.toml --lora.rank=32
"""

import os
from argparse import ArgumentParser, Namespace

from titan_moe.config.describe import options_help
from titan_moe.config.load import world_size_from_environment
from titan_moe.finetune.load import load_finetune
from titan_moe.finetune.tables import finetune_class
from titan_moe.runtime.ranks import check_ranks
from titan_moe.verbs.arguments import add_overrides, add_trust

CONFIG = finetune_class()
"""The class of the configuration: `titan_moe.cli` takes the names of its options for errors."""


def add_arguments(parser: ArgumentParser) -> None:
    meaning = "a file of train_configs/ by name (finetune_...), or a path"
    parser.add_argument("--config", required=True, help=meaning)
    add_trust(parser)
    add_overrides(parser, "finetune")
    parser.epilog = f"options of the configuration, with their defaults:\n{options_help(table=CONFIG)}"


def run(arguments: Namespace) -> int:
    check_ranks()
    world = world_size_from_environment()
    config = load_finetune(arguments.config, arguments.overrides, world, arguments.trust)
    from titan_moe.finetune.inputs import check_inputs

    inputs = check_inputs(config, int(os.environ.get("RANK") or "0"))
    if inputs.finished:
        print(inputs.finished)
        return 0
    os.environ.setdefault(
        "HF_HUB_DISABLE_TELEMETRY", "1"
    )  # TRL reports to the hub; read when the packages are imported
    from titan_moe.finetune.run import finetune  # imports torch and takes seconds, so after the checks

    return finetune(config, inputs)
