"""Compressed files as streams. The first bytes tell the compression, whatever the name says."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from titan_moe.errors import UserError, pip_install

MAGIC = {  # the first bytes of compressed files and archives
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "zip": rb"PK\x03\x04",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "rar": rb"Rar!\x1a\x07",
}
ZSTD_INPUT = 1 << 12  # bytes decompressed at a time, to at most 128 MiB


class UnreadableFile(Exception):
    """The content of a file can't be used. reason: the same words for all such files. details: of this file."""

    def __init__(self, reason: str, details: object = "") -> None:
        self.reason = reason
        self.details = (str(details).splitlines() or [""])[0][:200]
        super().__init__(f"{reason} ({self.details})" if self.details else reason)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """The content of a file as a stream, decompressed, and whether it is compressed.

    Raises UnreadableFile for an archive, UserError when a package is missing; reading raises EOFError, zlib.error,
    lzma.LZMAError or OSError without errno where the compressed data is damaged.
    """
    readers: dict[str, Callable[..., Any]]
    readers = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open, "zstd": open_zstd}
    with path.open("rb") as file:
        start = file.read(16)
        file.seek(0)
        kind = next((name for name, magic in MAGIC.items() if re.match(magic, start)), "")
        if kind and kind not in readers:
            raise UnreadableFile(f"file is a {kind} archive; unpack it")
        if not kind:
            yield file, False
        else:
            with readers[kind](file) as stream:
                yield stream, True


def open_zstd(file: IO[bytes]) -> io.BufferedReader:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"data.corpus: {file.name}: zstd files need the package zstandard ({pip_install('zstandard')}); "
            "or decompress them with `zstd -d`"
        ) from None
    return io.BufferedReader(ZstdReader(file, zstandard), 1 << 17)


class ZstdReader(io.RawIOBase):
    """Decompresses zstd frames. The package's own reader does not notice when a file breaks off."""

    def __init__(self, file: IO[bytes], zstandard: Any) -> None:
        self.file, self.zstandard = file, zstandard
        self.frame: Any = None  # decompresses the current frame
        self.pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.pending:
            ended = self.frame is None or self.frame.eof
            packed = (self.frame.unused_data if self.frame and ended else b"") or self.file.read(ZSTD_INPUT)
            if not packed and ended:
                return 0
            if not packed:
                raise EOFError("the compressed data breaks off")
            if ended:  # frames of `zstd --long=31` need a window of 2 GiB
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self.pending = memoryview(self.frame.decompress(packed))
            except self.zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
        size = min(len(buffer), len(self.pending))
        buffer[:size], self.pending = self.pending[:size], self.pending[size:]
        return size
