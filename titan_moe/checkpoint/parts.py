"""Reads the stored parts of a checkpoint's tensors, of each only the rows that are asked for.

A part is one tensor in a file of DCP, as torch.save writes it: a zip archive without compression, in which `data.pkl` describes
the tensor (shape, strides, type) and `data/0` has its values. So the place of every value in the file is known, and a rank
that needs some of a tensor's rows seeks to them. DCP's own reader loads the whole part and narrows it.
"""

import io
import itertools
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

DESCRIPTION_BYTES = 1 << 16
GAP_BYTES = 1 << 18
"""A range of at least so many bytes is read by itself; smaller ones are read together with what lies between them."""
LOCAL_HEADER = 30  # bytes of a zip entry's own header before its name
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class PartFile(io.RawIOBase):
    """A range of bytes of a file, as a file that zipfile and torch.load read."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        self.at = (0, self.at, self.length)[whence] + position
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.at)
        part = memoryview(buffer)[: max(0, min(len(buffer), self.length - self.at))]
        count = fill(self.file, part)
        self.at += count
        return count


def fill(file: BinaryIO, buffer: memoryview) -> int:
    """Reads until the buffer is full or the file ends: an unbuffered file may give less at once. Returns the bytes read."""
    count = 0
    while count < len(buffer) and (more := file.readinto(buffer[count:])):  # type: ignore[attr-defined] # of opened files
        count += more
    return count


class Values(NamedTuple):
    """Where the values of a stored tensor are in its file. They lie row by row, without gaps."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte of the file with the first value."""


class _Described(NamedTuple):
    """A tensor as `data.pkl` describes it."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _UnknownError(Exception):
    """A description of something else than a plain tensor."""


class _DescriptionUnpickler(pickle.Unpickler):
    """Reads `data.pkl` without making a tensor, and allows no other type than those of a plain tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Described(storage, offset, shape, strides)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return name
        raise _UnknownError

    def persistent_load(self, pid: Any) -> Any:
        return pid


class PartReader:
    """Reads one stored part."""

    def __init__(self, file: BinaryIO, info: Any) -> None:
        """file: opened without a buffer, since a buffer would read more than is needed. info: DCP's, of the part.

        Raises UnpicklingError for a part that is no archive, or would need more memory than it has bytes, as a compressed
        archive would."""
        self.file, self.info = file, info
        try:
            with zipfile.ZipFile(PartFile(file, info.offset, info.length)) as archive:
                entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
                size = sum(entry.file_size for entry in archive.infolist())
                if size > info.length:
                    raise pickle.UnpicklingError(
                        f"a part of {info.relative_path} has {info.length:,} bytes and unpacks to {size:,}"
                    )
                self.values = self.find_values(archive, entries)
        except zipfile.BadZipFile as error:
            raise pickle.UnpicklingError(f"a part of {info.relative_path} is damaged: {error}") from error

    def find_values(self, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> Values | None:
        """Where the values are; None for anything but a plain tensor whose values lie row by row in this machine's byte order:
        torch.load reads that as a whole."""
        description, data, order = (entries.get(name) for name in ("data.pkl", "data/0", "byteorder"))
        if description is None or data is None or description.file_size > DESCRIPTION_BYTES:
            return None
        if order is not None and (order.file_size > 16 or archive.read(order) != sys.byteorder.encode()):
            return None
        if data.compress_type != zipfile.ZIP_STORED or data.compress_size != data.file_size:
            return None
        try:
            found = _DescriptionUnpickler(io.BytesIO(archive.read(description))).load()
        except _UnknownError:
            return None
        if not isinstance(found, _Described):
            return None
        kind, storage, key, _, _ = found.storage
        shape, first = tuple(map(int, found.shape)), int(found.offset)
        dtype = DTYPES.get(storage)
        if kind != "storage" or key != "0" or dtype is None or min((first, *shape)) < 0:
            return None
        steps = strides_of(shape)
        if any(a != b for a, b, n in zip(found.strides, steps, shape, strict=True) if n > 1):
            return None
        if (first + math.prod(shape)) * dtype.itemsize > data.file_size:
            raise pickle.UnpicklingError(f"a part of {self.info.relative_path} has fewer values than its shape says")
        return Values(dtype, shape, self.data_start(data) + first * dtype.itemsize)

    def data_start(self, entry: zipfile.ZipInfo) -> int:
        """The byte of the file after an entry's own header. Raises UnpicklingError when the values end after the part."""
        at = self.info.offset + entry.header_offset
        header = bytearray(LOCAL_HEADER)
        self.file.seek(at)
        fill(self.file, memoryview(header))
        name, extra = (int.from_bytes(header[n : n + 2], "little") for n in (26, 28))
        start = at + LOCAL_HEADER + name + extra
        if start + entry.file_size > self.info.offset + self.info.length:
            raise pickle.UnpicklingError(f"a part of {self.info.relative_path} is damaged: its values are cut")
        return int(start)

    def read(self, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """The tensor's values from `offsets` on, `lengths` of them in each dimension, on the CPU. Raises UnpicklingError for
        values that the part does not have.

        Reads as many ranges of bytes as the first dimensions cut out; ranges below GAP_BYTES are read as one with what is
        between them."""
        values = self.values
        if values is None:
            whole: Tensor = torch.load(
                PartFile(self.file, self.info.offset, self.info.length),  # type: ignore[arg-type] # torch asks for less
                map_location="cpu",
                weights_only=True,
            )
            for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
                whole = whole.narrow(dim, offset, length)
            return whole
        inside = len(offsets) == len(lengths) == len(values.shape)
        if not inside or any(
            o < 0 or n < 0 or o + n > size for o, n, size in zip(offsets, lengths, values.shape, strict=True)
        ):
            raise pickle.UnpicklingError(
                f"a part of {self.info.relative_path} has the shape {values.shape}, which does not hold what is asked for"
            )
        steps = strides_of(values.shape)
        result = torch.empty(tuple(lengths), dtype=values.dtype)
        if not result.numel():
            return result
        fixed = iterated_dimensions(values, lengths, steps)
        span = 1 + sum((n - 1) * step for n, step in zip(lengths[fixed:], steps[fixed:], strict=True))
        base = sum(o * step for o, step in zip(offsets, steps, strict=True))
        buffer = torch.empty(span, dtype=values.dtype)
        for index in itertools.product(*(range(n) for n in lengths[:fixed])):
            first = base + sum(i * step for i, step in zip(index, steps[:fixed], strict=True))
            self.file.seek(values.start + first * values.dtype.itemsize)
            wanted = buffer.view(torch.uint8).numpy().data
            if fill(self.file, wanted) < len(wanted):
                raise pickle.UnpicklingError(f"a part of {self.info.relative_path} is damaged: its values are cut")
            result[index] = buffer.as_strided(tuple(lengths[fixed:]), steps[fixed:])
        return result


def iterated_dimensions(values: Values, lengths: Sequence[int], steps: Sequence[int]) -> int:
    """How many of the first dimensions are read index by index: as many as leave ranges of GAP_BYTES and are not read whole
    anyway."""
    cut = [dim for dim, (n, size) in enumerate(zip(lengths, values.shape, strict=True)) if n < size]
    fixed = cut[-1] if cut else 0
    while fixed and lengths[fixed] * steps[fixed] * values.dtype.itemsize < GAP_BYTES:
        fixed -= 1
    return fixed


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor of this shape whose values lie row by row."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
