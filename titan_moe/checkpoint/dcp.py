"""Checkpoints through torch.distributed.checkpoint.

    checkpoints/step-00000100/   DCP's files (tensors by global parameter name), state.json (all else), manifest.json

Loading executes no code from a file: it reads only tensors, and unpickles only DCP's types in the metadata.
"""

import errno
import pickle
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from titan_moe.errors import UserError

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP warns so with a single process

PICKLED_TYPES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")),
}
METADATA_MODULE = "torch.distributed.checkpoint.metadata"


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the types that DCP's metadata consists of, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (
            module == METADATA_MODULE
            and "." not in name
            and isinstance(getattr(torch.distributed.checkpoint.metadata, name, None), type)
        ):
            return getattr(torch.distributed.checkpoint.metadata, name)
        if (module, name) in PICKLED_TYPES:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member_of_enum  # Python 3.11.0 to 3.11.3 pickle enumeration members so
        raise pickle.UnpicklingError(f"the metadata names {module}.{name}, which is not part of a checkpoint")


def _member_of_enum(kind: Any, name: Any) -> Any:
    """Replaces `getattr` in the pickle; allows only members of DCP's enumerations."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and kind.__module__ == METADATA_MODULE):
        raise pickle.UnpicklingError(f"the metadata asks for {name!r} of {kind!r}, which is not an enumeration of DCP")
    return kind[str(name)]


class _Reader(FileSystemReader):
    """Reads the metadata with the restricted unpickler at once, so that damage is found before DCP's collectives."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        with (path / ".metadata").open("rb") as file:
            self.metadata = _MetadataUnpickler(file).load()
        if not isinstance(self.metadata, Metadata):
            raise pickle.UnpicklingError("no checkpoint metadata")
        if getattr(self.metadata, "storage_meta", None) is None:
            self.metadata.storage_meta = StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 - torch's signature
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:  # noqa: ARG002 - torch's signature
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")


def write_tensors(folder: Path, state: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes this rank's shards; a collective. Raises OSError, for example when the disk is full."""
    writer = FileSystemWriter(str(folder), thread_count=1)
    try:
        save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            cause: BaseException | None = failure
            while cause is not None:  # the system's error is in the context of torch.save's
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, cause.strerror, str(folder)) from error
                cause = cause.__context__
        raise OSError(errno.EIO, f"a rank could not write: {_cause(error)}", str(folder)) from error


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """All tensors to save: `model.NAME` (parameters and balancing biases) and `optimizer.NAME.KIND`."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    if optimizer is not None:
        moments: Any = get_optimizer_state_dict(model, optimizer)["state"]
        for name, kinds in moments.items():
            state |= {f"optimizer.{name}.{kind}": value for kind, value in kinds.items()}
    return state


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Loads into the model, and the optimizer if given. Raises UserError when damaged or of another model."""
    state = tensors(model, optimizer)
    read_tensors(path, state)
    model.load_state_dict({name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")})
    if optimizer is not None:
        current: Any = get_optimizer_state_dict(model, optimizer)
        for name, kinds in current["state"].items():
            current["state"][name] = {kind: state[f"optimizer.{name}.{kind}"] for kind in kinds}
        set_optimizer_state_dict(model, optimizer, current)


def read_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Loads into these tensors, with keys as in `tensors`. Raises UserError when damaged or of another model."""
    try:
        load(state, storage_reader=_Reader(path), planner=_TensorsOnly(), no_dist=not dist.is_initialized())
    except (
        CheckpointException,
        RuntimeError,
        OSError,
        ValueError,
        KeyError,
        EOFError,
        pickle.PickleError,
        AttributeError,
    ) as error:
        raise UserError(f"{path}: can't be loaded, it is damaged or of another model: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The first line of the original error, which DCP wraps in an exception of its own."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
