"""The registries of optimizers and of a user's own corpora and trackers, and the import of the modules that fill them.

Loss terms have their registry in `torchtitan_ext.terms`. Users import all of it from `titan_moe.extend`.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from titan_moe.errors import UserError

if TYPE_CHECKING:
    from titan_moe.config.tables import Config, Table


class Document(NamedTuple):
    """What a corpus yields. domain: a label by which `inspect` splits its measures."""

    text: str
    domain: str = ""


class Tracker(Protocol):
    """Receives what a run reports, on rank 0. Two more methods are optional:

    `start(step: int)`, called once before the first row, with the step of the checkpoint that the run resumes from (0: none);
    `log_images(step: int, images: dict[str, NDArray[uint8]])`, called at every validation with RGB images (H, W, 3) by name.
    """

    def log(self, row: dict[str, Any]) -> None:
        """Called with every row of metrics.jsonl: `kind` is "train", "validation" or "eval", `step` counts from 1."""

    def close(self) -> None:
        """Called once, when the run ends."""


TrackerFactory = Callable[["Config", Path], Tracker]

STREAMED_CORPORA = ("c4",)
"""Corpora that are streamed from the Hugging Face hub while the run trains."""
TRACKER_PACKAGES = ("wandb", "trackio")
"""Trackers that ship with titan_moe, each named after the optional package that it needs."""


class OptimizerEntry(NamedTuple):
    build: Callable[..., Any]
    state_tensors: Callable[..., int]
    options: "type[Table] | None"


optimizers: dict[str, OptimizerEntry] = {}
corpora: dict[str, Callable[[], Iterator[Document]]] = {}
trackers: dict[str, TrackerFactory] = {}


def register_optimizer(
    name: str, build: Callable[..., Any], state_tensors: Callable[..., int], options: "type[Table] | None" = None
) -> None:
    """Adds an optimizer for `optimizer.name = NAME`: `build(model, settings)` makes it, from sharded parameters.

    state_tensors: `(parameter's name, parameter)` to the number of tensors of its size that are kept, for `titan-moe plan`.
    options: becomes the table `[optimizer.NAME]`, with help and checks; `build` finds it in `settings.options`.
    """
    optimizers[name] = OptimizerEntry(build, state_tensors, options)


def register_corpus(name: str, function: Callable[[], Iterator[Document]]) -> None:
    """Adds a corpus for `data.corpus = NAME`: `function()` yields documents, in the same order every time."""
    corpora[name] = function


def is_streamed(corpus: str | list[str]) -> bool:
    """Whether `data.corpus` names a streamed corpus. One that a user registers under the same name is not."""
    return isinstance(corpus, str) and corpus in STREAMED_CORPORA and corpus not in corpora


def register_tracker(name: str, factory: TrackerFactory) -> None:
    """Adds a tracker for `metrics.trackers = [NAME]`: `factory(config, run_dir)` makes it, on rank 0."""
    trackers[name] = factory


def load_modules(names: Sequence[str], origin: str) -> None:
    """Imports every module or .py file. Raises UserError when one can't be imported."""
    for name in names:
        try:
            if name.endswith(".py"):
                _load_file(Path(name))
            else:
                importlib.import_module(name)
        except Exception as error:  # whatever the user's module raises is the user's to see, in one line
            raise UserError(f"{origin}: {name!r} can't be imported: {type(error).__name__}: {error}") from error


def module_digests(names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the source file of every imported module of `extensions.modules` that has one."""
    digests = {}
    for name in names:
        module = None if name.endswith(".py") else sys.modules[name]
        file = Path(name) if module is None else Path(module.__file__ or "")
        if file.is_file():
            digests[Path(name).name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digests


def _load_file(path: Path) -> None:
    module_name = f"titan_moe_extension_{path.stem}"
    if module_name in sys.modules and sys.modules[module_name].__file__ == str(path.resolve()):
        return
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
