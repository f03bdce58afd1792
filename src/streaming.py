"""Writes a `.pth` file whose tensors are made one after the other, so that they need not be in memory together.

`torch.save` wants all of them first. The file is the same archive: a pickle of names, dtypes and shapes, and one
uncompressed entry of bytes per tensor, each at a multiple of 64 bytes.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from src import storage
from src.errors import CheckpointError
from src.storage import PathLike

_FOLDER = "archive"
_ALIGNMENT_BYTES = 64
_HEADER_BYTES = 30
"""Of an entry's own header; its name and padding follow."""

_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
}
"""How such a file calls dtypes."""

_PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class _Stored:
    """The bytes of a tensor, which lie in an entry of their own."""

    dtype: torch.dtype
    number: int
    numel: int


@dataclass(frozen=True)
class _Outlined:
    """What takes a tensor's place in the pickle."""

    outline: Tensor
    number: int

    def __reduce__(self) -> tuple[Any, ...]:
        outline = self.outline
        stored = _Stored(outline.dtype, self.number, outline.numel())
        shape = tuple(outline.shape)
        return torch._utils._rebuild_tensor_v2, (stored, 0, shape, outline.stride(), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, part: object) -> tuple[Any, ...] | None:
        if not isinstance(part, _Stored):
            return None
        return "storage", _STORAGES[part.dtype], str(part.number), "cpu", part.numel


def save_one_by_one(path: PathLike, outlines: Mapping[str, Tensor], tensor_of: Callable[[str], Tensor]) -> None:
    """Writes tensors by name, atomically; `torch.load` reads them, mapped or not.

    Args:
        outlines: key -> a contiguous tensor on the meta device of the dtype and shape that `tensor_of` will give.
        tensor_of: gives the tensor of a key; called in order, once each, and each is let go before the next.

    Raises:
        CheckpointError: The file cannot be written. An existing file is then unchanged.
    """
    try:
        with storage.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            _write(file, archive, "data.pkl", _pickled(outlines))
            _write(file, archive, "byteorder", b"little")
            for number, (key, outline) in enumerate(outlines.items()):
                tensor = tensor_of(key)
                assert (tensor.dtype, tensor.shape) == (outline.dtype, outline.shape), key
                _write(file, archive, f"data/{number}", bytes_of(tensor))
                del tensor
            _write(file, archive, "version", b"3\n")
    except OSError as error:
        raise CheckpointError(storage.unwritable(path, error, outlines)) from error


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU in row-major order, without a copy where they lie so."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _pickled(outlines: Mapping[str, Tensor]) -> bytes:
    pickled = io.BytesIO()
    content = {key: _Outlined(outline, number) for number, (key, outline) in enumerate(outlines.items())}
    _Pickler(pickled, protocol=2).dump(content)
    return pickled.getvalue()


def _write(file: BinaryIO, archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    info.file_size = len(content)
    # An entry beyond 2 GiB gets a header of 20 bytes more.
    before = file.tell() + _HEADER_BYTES + len(info.filename) + 4 + (20 if info.file_size * 1.05 > 2**31 - 1 else 0)
    padding_bytes = -before % _ALIGNMENT_BYTES
    info.extra = b"FB" + padding_bytes.to_bytes(2, "little") + bytes(padding_bytes)
    with archive.open(info, "w") as entry:
        for start in range(0, len(content), _PIECE_BYTES):
            entry.write(content[start : start + _PIECE_BYTES])
