"""Files in the safetensors format: 8 bytes with the length of a JSON header, that header, and the tensors' bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import storage
from src.errors import CheckpointError
from src.identity import files_of_model, index_beside, index_of_shards
from src.streaming import bytes_of

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def load(path: Path, role: str) -> dict[str, Tensor]:
    """The tensors of such a file by name.

    Args:
        role: what the file should be, for messages.

    Raises:
        CheckpointError: The file is missing, damaged, or holds other than floating-point tensors.
    """
    try:
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= header_bytes <= min(_MOST_HEADER_BYTES, path.stat().st_size - _LENGTH_BYTES):
                raise CheckpointError(f"{path} is damaged or no safetensors file; copy or download it again")
            header = file.read(header_bytes)
            content = bytearray(file.read())
    except FileNotFoundError:
        raise CheckpointError(f"{role} {path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{role} {path} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(header)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or download it again") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} is damaged: its header is no JSON object; copy or download it again")
    return {name: _tensor(path, name, entry, content) for name, entry in entries.items() if name != "__metadata__"}


def load_model(path: Path) -> dict[str, Tensor]:
    """The tensors of a model by name, of all its shards; see `files_of_model`.

    Raises:
        CheckpointError: as `load`; or a shard holds other tensors than the index says.
    """
    tensors: dict[str, Tensor] = {}
    files = files_of_model(path)
    for file in files:
        held = load(file, "model file")
        if twice := tensors.keys() & held.keys():
            raise CheckpointError(f"{file} holds {min(twice)}, which another of the {len(files)} files holds, too")
        tensors |= held
    index = index_beside(path) or index_beside(files[0])
    if index is not None and (lacking := index_of_shards(index).keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{index} and the {len(files)} files beside it disagree about {min(lacking)}: copy or download all again"
        )
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors on the CPU by name, atomically.

    Raises:
        CheckpointError: The file cannot be written. An existing file is then unchanged.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        header[name] = entry
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    try:
        with storage.replacing(path) as file:
            file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            for tensor in tensors.values():
                file.write(bytes_of(tensor))
    except OSError as error:
        raise CheckpointError(storage.unwritable(path, error, tensors)) from error


def _tensor(path: Path, name: str, entry: Any, content: bytearray) -> Tensor:
    try:
        dtype, shape = _DTYPES.get(entry["dtype"]), [int(size) for size in entry["shape"]]
        first, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {name} is not described as a tensor") from error
    if dtype is None:
        raise CheckpointError(f"{path}: {name} is of {entry['dtype']}, expected {', '.join(_DTYPES)}")
    count = math.prod(shape)
    inside = 0 <= first <= end <= len(content)
    if min(shape, default=1) < 0 or end - first != count * dtype.itemsize or not inside:
        raise CheckpointError(f"{path} is damaged: {name} has no {count} values in it; copy or download it again")
    if not count:
        return torch.empty(shape, dtype=dtype)
    if first % dtype.itemsize:
        return torch.frombuffer(content[first:end], dtype=dtype).view(shape)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=first).view(shape)
