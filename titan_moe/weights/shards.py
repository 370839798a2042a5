"""The safetensors files of a model's directory: which tensors there are, and each of them when it is needed.

Only safetensors are read: pickled files can run code. Data stay on disk until a tensor is asked for.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_moe.errors import UserError
from titan_moe.runtime.json_file import one_line, read_json
from titan_moe.runtime.optional import optional
from titan_moe.weights.entries import Entry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_BYTES = 256 << 20
TYPES = ("F64", "F32", "F16", "BF16")
LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")
NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.rotary_emb\.(cos|sin)_cached")
"""Names that old versions of Transformers wrote beside the weights."""
PREDICTION = re.compile(r"(.*\.)?mtp[._].*")
"""Names of ERNIE's layers that predict tokens further ahead."""


class Shards:
    """The tensors of a directory by name."""

    def __init__(self, folder: Path) -> None:
        """Opens every file and reads its header. Raises UserError."""
        package = optional("safetensors", "hf")
        self.failure: type[Exception] = package.SafetensorError
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.file_of: dict[str, str] = {}
        for file in files_of(folder):
            path = (folder / file).resolve()  # the files of a download cache are links
            if not path.is_file():
                raise UserError(f"{folder / file}: is missing; download the model again")
            try:
                self.files[file] = package.safe_open(str(path), framework="pt", device="cpu")
            except (self.failure, OSError, ValueError) as error:
                raise UserError(f"{folder / file}: is no safetensors file or incomplete: {one_line(error)}") from error
            for name in self.files[file].keys():  # noqa: SIM118 - no mapping
                if name in self.file_of:
                    raise UserError(f"{folder}: {name} is in both {self.file_of[name]} and {file}")
                self.file_of[name] = file

    def check_experts(self, experts: int, layers: int) -> None:
        """Raises UserError where there are fewer tensors than experts, before a list of all names is made."""
        if layers * experts > len(self.file_of):
            raise UserError(
                f"{self.folder}: config.json says {experts} experts in {layers} layers, but the files have "
                f"{len(self.file_of)} tensors in all"
            )

    def check(self, entries: Iterable[Entry], layers: int, further: int, tied: bool) -> list[str]:
        """Raises UserError unless these tensors are there with their shapes, and no others.

        layers: of the configuration. further: layers after these that predict tokens further ahead and are not imported.
        tied: whether lm_head.weight may be there although the embedding stands for it. Returns the names that are left out."""
        wanted = {entry.name: entry for entry in entries}
        last = layers + further
        found = [int(match.group(1)) for name in self.file_of if (match := LAYER.match(name))]
        count = max(found, default=-1) + 1
        if not layers <= count <= last:
            raise UserError(
                f"{self.folder}: config.json says {layers} layers (num_hidden_layers), but the files have {count}"
            )
        missing = [name for name, entry in wanted.items() if entry.ours and name not in self.file_of]
        if missing:
            raise UserError(f"{self.folder}: {missing[0]} is missing in its files{and_more(missing)}")
        others = [name for name in self.file_of if name not in wanted]
        left_out = [name for name in others if NOT_WEIGHTS.fullmatch(name) or (tied and name == "lm_head.weight")]
        if further or any(PREDICTION.fullmatch(name) for name in others):
            left_out += [name for name in others if PREDICTION.fullmatch(name) or layer_of(name) >= layers]
        unexpected = sorted({*others} - {*left_out})
        if unexpected:
            raise UserError(
                f"{self.folder}: {unexpected[0]} is no tensor of the architecture in config.json{and_more(unexpected)}"
            )
        for name, entry in wanted.items():
            if entry.ours:
                self.check_shape(name, entry.shape)
        return left_out

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        part = self.files[self.file_of[name]].get_slice(name)
        stored, kind = tuple(part.get_shape()), part.get_dtype()
        where = f"{self.folder / self.file_of[name]}: {name}"
        if stored != shape:
            raise UserError(f"{where} has the shape {stored}; by config.json it must be {shape}")
        if kind not in TYPES:
            raise UserError(f"{where} is of type {kind}; only {', '.join(TYPES)} can be imported")

    def read(self, name: str) -> Tensor:
        """A tensor in float32. Raises UserError."""
        try:
            value: Tensor = self.files[self.file_of[name]].get_tensor(name)
        except (self.failure, OSError) as error:
            raise UserError(f"{self.folder / self.file_of[name]}: {name}: can't be read: {one_line(error)}") from error
        return value.to(torch.float32)


def layer_of(name: str) -> int:
    """The layer of a tensor; -1 outside of the layers."""
    match = LAYER.match(name)
    return int(match.group(1)) if match else -1


def and_more(names: list[str]) -> str:
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""


def files_of(folder: Path) -> list[str]:
    """The names of the files with the weights. Raises UserError."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if single.is_symlink() or single.exists():
            return [SINGLE]
        stray = sorted(path.name for path in folder.glob("*.safetensors"))
        if stray:
            raise UserError(f"{folder}: has {stray[0]} but no {INDEX}, which says what belongs together")
        pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
        if pickled:
            raise UserError(
                f"{folder}: has only pickled weights ({pickled[0]}), which can run code when they are read; save the model as "
                "safetensors"
            )
        raise UserError(f"{folder}: has no weights ({SINGLE} or {INDEX})")
    try:
        raw = read_json(index.resolve(), INDEX_BYTES)
        files = sorted(set(raw["weight_map"].values()))
    except OSError as error:
        raise UserError(f"{index}: can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is no index of tensors: {one_line(error)}") from error
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(r"[^/\0]{1,240}\.safetensors", file):
            raise UserError(f"{index}: names {str(file)[:80]!r}, which is no safetensors file of this directory")
    if not files:
        raise UserError(f"{index}: names no file")
    if single.exists() and SINGLE not in files:
        raise UserError(f"{folder}: has both {SINGLE} and {INDEX} with other files; remove the one that is out of date")
    return files
