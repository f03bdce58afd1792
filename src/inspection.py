"""What a file of tensors is, judged by its keys; how large its numbers are, and how far from another file's."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import safetensors
from src.adapters.files import said_beside, with_own_names
from src.adapters.hf import is_hf, read_hf
from src.checkpoint import Checkpoint, keys_in, open_checkpoint, read_states, read_tensors
from src.errors import CheckpointError
from src.model.shape import LAYER_KEY

STATE, ADAPTER, PARTS, MODEL = "state", "adapter", "parts", "model"
"""Kinds of files."""

REST = -1
"""Instead of a layer's number: what belongs to none."""

_PIECE_VALUES = 1 << 22

_STATE_SUFFIX = ".att.time_state"
_ADAPTER_SUFFIXES = (".lora_A", ".lora_B", ".bone")
_FIRST_FACTORS = (".init_lora_A", ".init_lora_B")


@dataclass(frozen=True)
class Content:
    """What a file, or a folder of Hugging Face's `peft`, holds.

    Attributes:
        path: as it was given.
        kind: STATE, ADAPTER (which may hold parts and states, too), PARTS or MODEL.
        tensors: by this program's keys, mapped.
        said: the JSON beside it, {} without one.
        size_bytes: of the file.
        model: what a model's file was opened as.
        for_clients: whether a client's form of it was found: safetensors, [head, key, value].
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor]
    said: Mapping[str, Any]
    size_bytes: int
    model: Checkpoint | None = None
    for_clients: bool = False


@dataclass
class LayerNumbers:
    """Sizes of the numbers of one layer, or how two files differ in it.

    Attributes:
        count: numbers.
        tensors: which hold them.
        squares: sum of their squares.
        largest: of their magnitudes.
        other_squares: the same sum in the other file.
        difference_squares: sum of the squares of the differences.
        product: sum of the products.
    """

    count: int = 0
    squares: float = 0.0
    largest: float = 0.0
    other_squares: float = 0.0
    difference_squares: float = 0.0
    product: float = 0.0
    tensors: int = 0

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return float((self.squares / self.count) ** 0.5)

    @property
    def other_rms(self) -> float:
        """The same of the other file."""
        return float((self.other_squares / self.count) ** 0.5)

    @property
    def distance(self) -> float:
        """Norm of the difference over the first's norm; infinite where that is 0 and the other is not."""
        if not self.difference_squares:
            return 0.0
        return float((self.difference_squares / self.squares) ** 0.5) if self.squares else float("inf")

    @property
    def cosine(self) -> float:
        """Of the angle between the two; 1 where both are 0, 0 where one is."""
        norms = (self.squares * self.other_squares) ** 0.5
        return float(self.product / norms) if norms else float(self.squares == self.other_squares)


def read_content(path: str) -> Content:
    """Opens a file of any kind.

    Raises:
        CheckpointError: It cannot be read, or is none of the kinds.
    """
    file = Path(path)
    if file.is_dir():
        tensors, said = read_hf(file)
        size_bytes = sum(entry.stat().st_size for entry in file.iterdir() if entry.is_file())
        return Content(file, ADAPTER, tensors, said, size_bytes)
    if is_hf(file) or file.suffix in (".st", ".state"):
        return _read_safetensors(file)
    role = "state, adapter or model file"
    own_names = with_own_names(dict.fromkeys(keys_in(file, role)))
    said = said_beside(file) or {}
    kind = _kind(own_names)
    if kind == "first factors":
        raise CheckpointError(
            f"{path} holds the factors that PiSSA began with: name the adapter's own file, which needs it beside it"
        )
    size_bytes = os.path.getsize(file)
    if kind == MODEL:
        model = open_checkpoint(file)
        return Content(file, kind, model, said, size_bytes, model)
    tensors = read_states(file) if kind == STATE else with_own_names(read_tensors(file, role))
    return Content(file, kind, tensors, said, size_bytes)


def _read_safetensors(file: Path) -> Content:
    tensors = safetensors.load(file, "state or adapter file")
    if tensors and all(key.endswith(_STATE_SUFFIX) for key in tensors):
        return Content(file, STATE, tensors, {}, os.path.getsize(file), for_clients=True)
    tensors, said = read_hf(file)
    if _kind(tensors) != ADAPTER:
        raise CheckpointError(
            f"{file} holds {len(tensors)} tensors, of which none is a state's or an adapter's: models are read as .pth"
        )
    return Content(file, ADAPTER, tensors, said, os.path.getsize(file))


def _kind(keys: Collection[str]) -> str:
    if all(key.endswith(_STATE_SUFFIX) for key in keys):
        return STATE
    if any(key.endswith(_FIRST_FACTORS) for key in keys):
        return "first factors"
    if any(key.endswith(_ADAPTER_SUFFIXES) for key in keys):
        return ADAPTER
    return MODEL if {"emb.weight", "head.weight"} <= set(keys) else PARTS


def layers_of(tensors: Mapping[str, Tensor]) -> dict[int, LayerNumbers]:
    """Sizes of the numbers of every layer, and under REST of what belongs to none; in order."""
    found: dict[int, LayerNumbers] = {}
    for layer, key in _by_layer(tensors):
        _add(found.setdefault(layer, LayerNumbers()), tensors[key])
    return found


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[int, LayerNumbers]:
    """How two files with the same keys and shapes differ in every layer, and under REST in what belongs to none."""
    found: dict[int, LayerNumbers] = {}
    for layer, key in _by_layer(first):
        numbers = found.setdefault(layer, LayerNumbers())
        _add(numbers, first[key])
        for one, other in zip(_pieces(first[key]), _pieces(second[key]), strict=True):
            numbers.other_squares += float(other.square().sum())
            numbers.difference_squares += float((other - one).square().sum())
            numbers.product += float((one * other).sum())
    return found


def together(layers: Mapping[int, LayerNumbers]) -> LayerNumbers:
    """All of them as one."""
    total = LayerNumbers()
    for numbers in layers.values():
        total.count += numbers.count
        total.tensors += numbers.tensors
        total.squares += numbers.squares
        total.largest = max(total.largest, numbers.largest)
        total.other_squares += numbers.other_squares
        total.difference_squares += numbers.difference_squares
        total.product += numbers.product
    return total


def _add(numbers: LayerNumbers, tensor: Tensor) -> None:
    numbers.tensors += 1
    numbers.count += tensor.numel()
    if tensor.numel():
        numbers.squares += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
        low, high = tensor.aminmax()
        numbers.largest = max(numbers.largest, abs(float(low)), abs(float(high)))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Its values in fp64, so many at a time that there is room for them."""
    return (piece.double() for piece in tensor.reshape(-1).split(_PIECE_VALUES))


def _by_layer(keys: Mapping[str, Tensor]) -> Iterator[tuple[int, str]]:
    found = ((LAYER_KEY.match(key), key) for key in keys)
    numbered = [(int(match[1]) if match else REST, key) for match, key in found]
    yield from sorted(numbered, key=lambda pair: (pair[0] == REST, pair[0]))
