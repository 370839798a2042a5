"""Makes a checkpoint to start from out of another program's model: a directory with config.json and safetensors.

Architectures: mixtral, olmoe, qwen2_moe, qwen3_moe, glm4_moe, ernie4_5_moe, deepseek (DeepSeek-MoE-16B), and the dense llama
and qwen3, whose layers can become experts. Code in the directory is never run.

example: titan-moe import downloads/OLMoE-1B-7B --output runs/olmoe
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from titan_moe.config.load import world_size_from_environment
from titan_moe.errors import UserError
from titan_moe.verbs.arguments import path_argument


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=path_argument, metavar="PATH", help="the directory of the model")
    meaning = "the directory to write, empty or not there (default: runs/NAME with PATH's name)"
    parser.add_argument("--output", type=path_argument, metavar="DIR", help=meaning)
    meaning = "a sentencepiece .model or a tokenizer.json (default: the one in PATH)"
    parser.add_argument("--tokenizer", default="", metavar="FILE", help=meaning)


def run(arguments: Namespace) -> int:
    source: Path = arguments.source
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; give the directory of a model (nothing is downloaded)")
    if world_size_from_environment() > 1:
        raise UserError("environment: WORLD_SIZE: import runs in one process; any number of ranks can load the result")
    out = arguments.output or Path("runs") / source.absolute().name
    from titan_moe.weights.import_folder import import_folder  # imports torch, so after the checks

    for line in import_folder(source, out, arguments.tokenizer):
        print(line)
    return 0
