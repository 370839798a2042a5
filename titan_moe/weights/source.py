"""A checkpoint to export: verified, and read a few tensors at a time, so that no more than a layer is in memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from titan_moe.checkpoint.dcp import read_tensors
from titan_moe.checkpoint.declared import check_size
from titan_moe.checkpoint.prepared import run_of
from titan_moe.checkpoint.resume import damage
from titan_moe.checkpoint.run_dir import all_steps
from titan_moe.checkpoint.state import STATE_FILE, State, read_state
from titan_moe.config.checks import check_model, check_sizes
from titan_moe.config.tables import Config, Model, Table, Training
from titan_moe.data.prepare import cache_root
from titan_moe.data.stored import TOKENIZER_FILE, stored_tokenizer
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import single
from titan_moe.runtime.json_file import first_mistake
from torchtitan_ext.terms import Terms

BIAS = ".expert_bias"
T = TypeVar("T", bound=Table)


@dataclass(frozen=True)
class Source:
    """A checkpoint whose files agree with its manifest."""

    path: Path
    state: State
    model: Model
    """The table [model], with the vocabulary size."""
    training: Training
    tokenizer: Tokenizer

    @property
    def run(self) -> Path:
        """The run directory."""
        return run_of(self.path)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor of the model, by its name in the state_dict."""
        with torch.device("meta"):
            model = Transformer(self.model, Terms([]), torch.float32)
        return {name: value.shape for name, value in model.state_dict().items()}

    @property
    def parameters(self) -> int:
        """Numbers that were trained: without the balancing biases."""
        return sum(shape.numel() for name, shape in self.shapes.items() if not name.endswith(BIAS))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors of the model, in float32, by name. Raises UserError when the checkpoint does not have them."""
        state = {f"model.{name}": torch.empty(self.shapes[name]) for name in names}
        if state:
            read_tensors(self.path, state)
        return {name.removeprefix("model."): value for name, value in state.items()}

    @cached_property
    def biased(self) -> bool:
        """Whether a balancing bias is not zero."""
        biases = self.read(name for name in self.shapes if name.endswith(BIAS))
        return any(bool(bias.any()) for bias in biases.values())


def open_source(given: Path, step: int) -> Source:
    """The checkpoint at a path, or of a run directory the one of a step (0: the newest). Raises UserError.

    No module that the run's configuration names is imported, and no file that it names is read."""
    path = checkpoint_of(given, step)
    state = read_state(path, "checkpoint")
    origin = f"{path}/{STATE_FILE}"
    model = table(Model, state.config.get("model", {}), f"{origin}: model")
    training = table(Training, state.config.get("training", {}), f"{origin}: training")
    config = Config(model=model, training=training)
    for check in (check_model, check_sizes):
        check(config, lambda key: f"{origin}: {key}")
    problem = damage(path, single(torch.device("cpu")))
    if problem is not None:
        raise UserError(f"{path} is damaged: {problem}; choose another checkpoint with --step")
    check_size(model, path)
    tokenizer = stored_tokenizer(run_of(path), state.tokenizer, cache_root(config))
    if tokenizer is None:
        raise UserError(
            f"{path}: its tokenizer is neither in the run directory nor in the cache; copy the run's {TOKENIZER_FILE} to "
            f"{run_of(path) / TOKENIZER_FILE}"
        )
    vocabulary = model.vocab_size or tokenizer.vocab_size
    if vocabulary < tokenizer.vocab_size:
        raise UserError(
            f"{origin}: model.vocab_size = {vocabulary} is less than the tokenizer's {tokenizer.vocab_size}"
        )
    return Source(path, state, model.model_copy(update={"vocab_size": vocabulary}), training, tokenizer)


def checkpoint_of(given: Path, step: int) -> Path:
    """The checkpoint that a run directory or checkpoint and a step mean. Raises UserError.

    The newest one, even if it is damaged: an older one is exported only when it is asked for."""
    checkpoints = given / "checkpoints"
    if step:
        path = checkpoints / f"step-{step:08d}"
        if not path.is_dir():
            raise UserError(f"--step = {step}: there is no {path}")
        return path
    steps = all_steps(checkpoints)
    if steps:
        return checkpoints / f"step-{steps[-1]:08d}"
    if not (given / STATE_FILE).exists():
        raise UserError(f"{given}: neither a checkpoint nor a run directory with one")
    return given


def table(kind: type[T], values: dict[str, Any], origin: str) -> T:
    """A table of a stored configuration. Raises UserError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}.{first_mistake(error)}") from error
