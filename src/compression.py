"""Packed files: which kinds there are, and the bytes that were packed, read as they are asked for."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO, cast

from src.errors import DataError

SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Of the names of packed files; what counts is how a file begins."""
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""What reading a packed file raises, beside OSError, where it is cut short or was changed."""

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PIECE_BYTES = 1 << 16
_LARGEST_WINDOW = 1 << 31


def packed_by(head: bytes) -> str:
    """The program that packed a file which begins like this; "" if none did."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


def unpacked(file: BinaryIO, kind: str, path: str) -> BinaryIO:
    """What was packed into an open file; reading it may raise one of `DAMAGED`.

    Args:
        file: at its beginning.
        kind: what `packed_by` says.
        path: of the file, for messages.

    Raises:
        DataError: the package that reads this kind is not installed.
    """
    if kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if kind == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if kind == "xz":
        return cast(BinaryIO, lzma.LZMAFile(file))
    assert kind == "zstd", kind
    return io.BufferedReader(_Zstd(file, path), _PIECE_BYTES)


class _Zstd(io.RawIOBase):
    """Frames of zstd, one after the other; a frame without its end is damage, which the package passes over."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        super().__init__()
        try:
            import zstandard
        except ImportError:
            raise DataError(
                f"{path} is packed by zstd, which needs a package: pip install zstandard, or unpack it (unzstd)."
            ) from None
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._error: type[Exception] = zstandard.ZstdError
        self._file = file
        self._frame: Any = None
        self._packed = b""
        self._ready = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        while not self._ready:
            if self._frame is not None and self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
            self._packed = self._packed or self._file.read(_PIECE_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._ready = self._frame.decompress(self._packed)
            except self._error as error:
                raise zlib.error(str(error)) from error
            self._packed = b""
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
