"""Writes a checkpoint's weights for other programs: a directory for Transformers, or a GGUF file for llama.cpp.

examples: titan-moe export runs/debug --output debug-hf
          titan-moe export runs/debug --format gguf --dtype q8_0 --output debug.gguf
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from titan_moe.config.load import world_size_from_environment
from titan_moe.errors import UserError
from titan_moe.runtime.files import refuse_link
from titan_moe.verbs.arguments import add_number, path_argument

DTYPES = {"hf": ("float32", "bfloat16"), "gguf": ("f32", "f16", "bf16", "q8_0")}
"""Types of weights by format."""
LONG_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Other names of GGUF's types."""
DEFAULTS = {"hf": {"bfloat16": "bfloat16"}, "gguf": {"bfloat16": "bf16"}}
"""Type of weights for a type that the model was trained in; for others it is the first of `DTYPES`."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=path_argument, metavar="RUN", help="a run directory or one of its checkpoints"
    )
    add_number(parser, "--step", 0, "step of the checkpoint; 0 is the newest", 0)
    meaning = "hf: a directory for Transformers; gguf: a file for llama.cpp (default: hf)"
    parser.add_argument("--format", default="hf", choices=[*DTYPES], help=meaning)
    types = "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in DTYPES.items())
    parser.add_argument(
        "--dtype", default="", metavar="TYPE", help=f"of the weights. {types} (default: training.dtype)"
    )
    meaning = "what to write: a directory that is empty or not there, or a file (default: in RUN/export/)"
    parser.add_argument("--output", type=path_argument, metavar="PATH", help=meaning)


def run(arguments: Namespace) -> int:
    kinds = DTYPES[arguments.format]
    dtype = LONG_NAMES.get(arguments.dtype, arguments.dtype) if arguments.format == "gguf" else arguments.dtype
    if dtype and dtype not in kinds:
        raise UserError(f"--dtype = {arguments.dtype!r}: --format {arguments.format} has {', '.join(kinds)}")
    if world_size_from_environment() > 1:
        raise UserError(
            "environment: WORLD_SIZE: export runs in one process; it reads a checkpoint of any number of ranks"
        )
    from titan_moe.weights.target import check_target  # does not import torch, unlike the others

    if arguments.output is not None:
        check_target(arguments.output, arguments.format == "hf")
    from titan_moe.weights.gguf_file import export_file
    from titan_moe.weights.source import open_source
    from titan_moe.weights.transformers_folder import export_folder

    source = open_source(arguments.checkpoint, arguments.step)
    dtype = dtype or DEFAULTS[arguments.format].get(source.training.dtype, kinds[0])
    out = arguments.output or default_target(source.run, source.state.step, arguments.format, dtype)
    write = export_folder if arguments.format == "hf" else export_file
    for line in write(source, out, dtype):
        print(line)
    return 0


def default_target(run: Path, step: int, form: str, dtype: str) -> Path:
    """Where an export of a run goes when the user names no place."""
    name = f"step-{step:08d}-{dtype}"
    folder = run / "export"
    refuse_link(folder)
    return folder / (name if form == "hf" else f"{name}.gguf")
