"""Checkpoints through torch.distributed.checkpoint.

    checkpoints/step-00000100/   DCP's files (tensors by global parameter name), state.json (all else), manifest.json

Loading executes no code from a file: it reads only tensors, and unpickles only DCP's types in the metadata.
"""

import errno
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from titan_moe.checkpoint.parts import PartReader
from titan_moe.errors import UserError
from titan_moe.runtime.files import read_file

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP warns so with a single process

PICKLED_TYPES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")),
}
METADATA_BYTES = 1 << 30
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
        self.metadata = _MetadataUnpickler(io.BytesIO(read_file(path / ".metadata", METADATA_BYTES))).load()
        if not isinstance(self.metadata, Metadata):
            raise pickle.UnpicklingError("no checkpoint metadata")
        if getattr(self.metadata, "storage_meta", None) is None:
            self.metadata.storage_meta = StorageMeta()
        sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file() and not file.is_symlink()}
        check_storage(self.metadata, sizes)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As FileSystemReader's, but reads of a stored tensor only what the plan asks for, and checks it first."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with (Path(self.path) / name).open("rb", buffering=0) as file:
                readers: dict[int, PartReader] = {}
                for item in items:
                    info = self.storage_data[item.storage_index]
                    if item.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(item, io.BytesIO())
                        continue
                    if info.offset not in readers:
                        readers[info.offset] = PartReader(file, info)
                    tensor = readers[info.offset].read(item.storage_offsets, item.lengths)
                    target = planner.resolve_tensor(item).detach()
                    if target.shape != tensor.shape:
                        raise ValueError(f"{item.dest_index.fqn} has the shape {tensor.shape}, not {target.shape}")
                    target.copy_(tensor)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 - torch's signature
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


def check_storage(metadata: Metadata, sizes: dict[str, int]) -> None:
    """Raises UnpicklingError unless every part is inside one of the checkpoint's own files, of which `sizes` has the bytes, and
    the tensors that the parts make up are no larger than they are."""
    declared: dict[str, int] = {}
    for index, part in (metadata.storage_data or {}).items():
        inside = part.relative_path in sizes and part.offset >= 0 and part.length > 0
        if not inside or part.offset + part.length > sizes[part.relative_path]:
            raise pickle.UnpicklingError(
                f"the metadata names {part.relative_path!r}, which is not a part of this checkpoint"
            )
        declared[index.fqn] = declared.get(index.fqn, 0) + part.length
    for name, tensor in metadata.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            size = tensor.size.numel() * tensor.properties.dtype.itemsize
            if size > declared.get(name, 0):
                raise pickle.UnpicklingError(
                    f"{name} has {size:,} bytes by the metadata, and {declared.get(name, 0):,} in the files"
                )


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:  # noqa: ARG002 - torch's signature
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")


class PlanCache:
    """Plans of a checkpoint, kept from one to the next: only the first one is sent to rank 0, merged there and sent back, as
    long as names and shards stay as they are.

    DCP keeps them in class attributes by a planner's key. So every cache has a key of its own, on every rank the same."""

    numbers = itertools.count()

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """To be called on every rank when a checkpoint failed on one: some ranks may then have kept plans that others lack."""
        self.key = f"titan_moe.{next(self.numbers)}"

    def planner(self) -> DefaultSavePlanner:
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = self.key
        return planner


class _Lazy(DefaultSavePlanner):
    """Asks for each tensor when its turn to be written comes."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.read(write_item.index.fqn)


def write_lazily(folder: Path, shapes: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Writes a checkpoint from one process with one tensor in memory at a time. Raises OSError.

    shapes: tensors on the meta device, by name. read: the tensor of a name, with the shape and type of that one."""
    write_tensors(folder, shapes, None, _Lazy(read))


def write_tensors(
    folder: Path, state: dict[str, Tensor], group: dist.ProcessGroup | None, planner: SavePlanner | None = None
) -> None:
    """Writes this rank's shards; a collective. Raises OSError, for example when the disk is full."""
    writer = FileSystemWriter(str(folder), thread_count=1)
    try:
        save(state, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
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
        TypeError,
        EOFError,
        IndexError,
        ArithmeticError,
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
