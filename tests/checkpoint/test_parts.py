"""Stored parts of tensors: any block of one is read, only its bytes are, and what is no plain tensor is read as before."""

import math
import pickle
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.helpers.ranks import launch
from tests.helpers.steps import VOCABULARY, config_of, mesh_of
from titan_moe.checkpoint import parts
from titan_moe.checkpoint.dcp import read_tensors, tensors, write_tensors
from titan_moe.checkpoint.parts import PartReader
from titan_moe.errors import UserError
from titan_moe.model.gemm import local
from titan_moe.train.build import build_model

BEFORE = 1000  # bytes in the file before the part


def stored(path: Path, tensor: Tensor) -> Any:
    """Writes a tensor as DCP does, not at the start of the file. Returns what DCP's metadata says of the part."""
    with path.open("wb") as file:
        file.write(bytes(BEFORE))
        torch.save(tensor, file)
        end = file.tell()
        file.write(bytes(BEFORE))
    return SimpleNamespace(relative_path=path.name, offset=BEFORE, length=end - BEFORE)


def block(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


class CountingFile:
    """A file that adds up the bytes that are read of it."""

    def __init__(self, file: Any) -> None:
        self.file, self.count = file, 0

    def seek(self, *arguments: int) -> int:
        return int(self.file.seek(*arguments))

    def readinto(self, buffer: memoryview) -> int:
        got = int(self.file.readinto(buffer))
        self.count += got
        return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_any_block_is_that_of_the_whole_tensor_and_only_its_bytes_are_read(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(0)
    for number in range(40):
        shape = [dice.randrange(1, 6) for _ in range(dice.randrange(5))]
        tensor = torch.randint(0, 100, shape).to(dtype)
        offsets = [dice.randrange(size) for size in shape]
        lengths = [dice.randrange(1, size - offset + 1) for offset, size in zip(offsets, shape, strict=True)]
        info = stored(tmp_path / "part", tensor)
        for gap in (1, 1 << 18):
            monkeypatch.setattr(parts, "GAP_BYTES", gap)
            with (tmp_path / "part").open("rb", buffering=0) as opened:
                file = CountingFile(opened)
                reader = PartReader(file, info)  # type: ignore[arg-type]
                assert reader.values is not None
                file.count = 0
                found = reader.read(offsets, lengths)
            assert torch.equal(found, block(tensor, offsets, lengths)), (number, shape, offsets, lengths)
            assert found.dtype == dtype
            if gap == 1:  # every block of the last dimension that is cut is read by itself
                assert file.count == math.prod(lengths) * dtype.itemsize
            assert math.prod(lengths) * dtype.itemsize <= file.count <= tensor.numel() * dtype.itemsize


def test_rows_are_one_read_and_small_columns_are_read_with_what_is_between_them(tmp_path: Path) -> None:
    tensor = torch.arange(8 * 64 * 16, dtype=torch.float32).view(8, 64, 16)
    info = stored(tmp_path / "part", tensor)
    with (tmp_path / "part").open("rb", buffering=0) as opened:
        file = CountingFile(opened)
        reader = PartReader(file, info)  # type: ignore[arg-type]
        for offsets, lengths, numbers in (((2, 0, 0), (3, 64, 16), 3 * 64 * 16), ((0, 0, 4), (8, 64, 4), 8191 - 11)):
            file.count = 0
            assert torch.equal(reader.read(offsets, lengths), block(tensor, offsets, lengths))
            assert file.count == numbers * 4


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12.0).to(torch.float8_e4m3fn).view(3, 4),
        torch.nn.Parameter(torch.arange(12.0).view(3, 4)),
    ],
    ids=["columns first", "a type without a storage class", "a parameter"],
)
def test_what_is_not_a_plain_tensor_is_read_by_torch(tensor: Tensor, tmp_path: Path) -> None:
    info = stored(tmp_path / "part", tensor)
    with (tmp_path / "part").open("rb", buffering=0) as file:
        reader = PartReader(file, info)  # type: ignore[arg-type]
        assert reader.values is None
        found = reader.read((1, 0), (2, 2))
    assert torch.equal(found.float(), block(tensor.detach().float(), (1, 0), (2, 2)))


def test_another_byte_order_is_left_to_torch(tmp_path: Path) -> None:
    info = stored(tmp_path / "part", torch.arange(4.0))
    source = tmp_path / "source"
    source.write_bytes((tmp_path / "part").read_bytes()[BEFORE : BEFORE + info.length])
    swapped = torch.arange(4.0).numpy().byteswap().tobytes()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "big", "w") as new:
        for entry in old.infolist():
            replaced = {"byteorder": b"big", "data/0": swapped}.get(entry.filename.partition("/")[2])
            new.writestr(entry.filename, old.read(entry) if replaced is None else replaced)
    whole = SimpleNamespace(relative_path="big", offset=0, length=(tmp_path / "big").stat().st_size)
    with (tmp_path / "big").open("rb", buffering=0) as file:
        reader = PartReader(file, whole)  # type: ignore[arg-type]
        assert reader.values is None
        assert reader.read((1,), (2,)).tolist() == [1.0, 2.0]


def test_values_that_a_part_does_not_have_are_refused(tmp_path: Path) -> None:
    info = stored(tmp_path / "part", torch.arange(12.0).view(3, 4))
    with (tmp_path / "part").open("rb", buffering=0) as file:
        reader = PartReader(file, info)  # type: ignore[arg-type]
        for offsets, lengths in (((2, 0), (2, 4)), ((0,), (3,)), ((-1, 0), (1, 4))):
            with pytest.raises(pickle.UnpicklingError, match="which does not hold what is asked for"):
                reader.read(offsets, lengths)


def model_tensors(words: list[str], world: int) -> dict[str, Tensor]:
    config = config_of(["--model.moe.hidden_dim=256", *words], world)
    return tensors(build_model(config, VOCABULARY, mesh_of(config, world)), None)


def refusal(folder: Path, state: dict[str, Tensor]) -> str:
    """Why a checkpoint is not read; empty when it is."""
    try:
        read_tensors(folder, state)
    except UserError as error:
        return str(error)
    return ""


def test_a_mangled_part_is_refused_in_one_line_or_read(tmp_path: Path) -> None:
    """Whatever an archive says of itself: bytes around the values are altered, in all parts."""
    state = model_tensors([], 1)
    write_tensors(tmp_path / "saved", state, None)
    (path,) = (tmp_path / "saved").glob("*.distcp")
    raw, dice, refused = path.read_bytes(), random.Random(0), 0
    description = [at for at in range(len(raw)) if raw.startswith((b"PK", b"\x80\x02ctorch"), at)]
    for _ in range(150):
        mangled = bytearray(raw)
        at = dice.choice(description) + dice.randrange(160)
        mangled[at : at + 1] = dice.choice([bytes([raw[at] ^ 1 << dice.randrange(8)]), dice.randbytes(1)])
        path.write_bytes(mangled)
        message = refusal(tmp_path / "saved", state)
        assert "\n" not in message
        refused += bool(message)
    assert 20 < refused < 150


def read_bytes() -> int:
    """Bytes that this process has read so far, of files and pipes."""
    return int(Path("/proc/self/io").read_text().split()[1])


def save(folder: Path) -> None:
    state = model_tensors([], 1)
    for number, tensor in enumerate(state.values()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + number)
    write_tensors(folder, state, None)


def load_and_count(folder: Path, words: list[str], world: int) -> tuple[int, int, int, int]:
    """Bytes that were read, bytes of this rank's tensors and of its experts, and how many values are wrong."""
    state = model_tensors(words, world)
    before = read_bytes()
    read_tensors(folder, state)
    count = read_bytes() - before
    wrong = 0
    for number, tensor in enumerate(state.values()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        wanted = torch.arange(whole.numel()).view(whole.shape) + number
        wrong += int((whole != wanted.to(whole.dtype)).sum())
    sizes = {name: local(x).numel() * x.element_size() for name, x in state.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return count, sum(sizes.values()), experts, wrong


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the bytes that a process reads are counted by Linux only"
)
@pytest.mark.parametrize("words", [["--parallelism.ep=2"], []], ids=["experts on two ranks", "FSDP"])
def test_a_rank_of_another_layout_reads_its_rows_only(words: list[str], tmp_path: Path) -> None:
    """Two ranks load what one rank saved: each reads half of the experts' bytes, and of every tensor its rows."""
    save(tmp_path)
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.distcp"))
    for count, own, experts, wrong in launch(2, load_and_count, tmp_path, words, 2):
        assert wrong == 0
        assert own < 0.51 * whole
        assert experts > 0.9 * own
        # The metadata, the plans of the other rank, and of each part its archive's directory.
        assert own < count < own + 100_000 < 0.6 * whole
