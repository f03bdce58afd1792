"""Model and state files: recognised before they are used, checked, and written with standard keys.

A file of another kind is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import safetensors, storage
from src.errors import CheckpointError
from src.model.architectures import recognise, shape_of, with_own_names
from src.model.shape import ModelShape, state_key
from src.storage import PathLike

_PREFIXES = ("_forward_module.", "module.", "_orig_mod.", "model.")
"""What DeepSpeed engines, DataParallel, torch.compile and wrapping modules put before every key."""

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

FILE_VALUE_BYTES = 2
"""Checkpoints are written in bf16."""

_ANOTHER_MODEL = "copy or download it again, or name another model"
_ANOTHER_STATE = "name a state file that training wrote"
_STATE_SUFFIX = ".att.time_state"
_ADAPTER_SUFFIXES = (".lora_A", ".bone", ".disha")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a model file is, without its weights.

    Attributes:
        shape: all sizes, read from the tensors.
        dtype: of `emb.weight`, as "bfloat16", "float16", "float32" or "float64". A merged state may differ.
        has_state: whether every layer has a `time_state` (a merged model).
    """

    shape: ModelShape
    dtype: str
    has_state: bool


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model file by standard key.

    A tensor's bytes are read from the file whenever it is asked for, so that host memory does not grow with the file.

    Args:
        info: what the file is.
        outlines: tensors, those that are read from the file without bytes, on the meta device.
        source: see below.
        file: where bytes are read; None if every tensor is there.

    Attributes:
        info: what the file is.
        outlines: dtype and shape of every tensor.
        source: its path, for messages.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        outlines: Mapping[str, Tensor],
        source: PathLike,
        file: storage.TensorFile | None = None,
    ) -> None:
        self.info = info
        self.outlines = outlines
        self.source = source
        self._file = file

    def __getitem__(self, key: str) -> Tensor:
        return self.read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.outlines

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)

    def read(self, key: str, *, pinned: bool = False) -> Tensor:
        """A tensor; see `storage.TensorFile.read`."""
        tensor = self.outlines[key]
        return self._file.read(tensor, pinned=pinned) if self._file is not None and tensor.is_meta else tensor

    def overlaid(self, others: Mapping[str, Tensor]) -> Checkpoint:
        """The same with other tensors in place of its own and beside them."""
        return Checkpoint(self.info, {**self.outlines, **others}, self.source, self._file)


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Opens a model file and checks that it is a complete model of an architecture there is.

    Key prefixes of wrapping modules (`_PREFIXES`), and a `{"state_dict": ...}` around the keys, are taken off. RWKV-7
    is also read in Hugging Face's form, from one `.safetensors` file or several; see `files_of_model`.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind or architecture, or a key is
            missing, superfluous, misshapen or not a floating-point tensor.
    """
    file: storage.TensorFile | None = None
    named = _in_hf_form(path)
    if not named:
        file, named = _opened(path, "model file")
    content = with_own_names(named)
    if all(key.endswith(_STATE_SUFFIX) for key in content):
        raise CheckpointError(
            f"{path} holds only the time_state of {len(content)} layers, so it is a state file: name the base model it "
            "was trained on here"
        )
    try:
        architecture = recognise(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    tensors = _float_tensors(path, content)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        shape = architecture.from_shapes(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no complete {architecture.family} model: {error}; {_ANOTHER_MODEL}") from None
    problems = shape.key_problems(shapes)
    if problems:
        raise CheckpointError(
            f"{path} is no complete {architecture.family} model, judged by the sizes of its embedding and first "
            f"layer: {'; '.join(problems)}; {_ANOTHER_MODEL}"
        )
    info = CheckpointInfo(shape, _dtype_name(tensors["emb.weight"].dtype), has_state=state_key(0) in tensors)
    return Checkpoint(info, tensors, path, file)


def fresh_checkpoint(shape: ModelShape, seed: int) -> Checkpoint:
    """An untrained model in fp32, as if it had been opened."""
    info = CheckpointInfo(shape=shape, dtype="float32", has_state=False)
    return Checkpoint(info, shape.fresh_parameters(seed, torch.float32), "the fresh model")


def load_state(path: PathLike, shape: ModelShape) -> dict[str, Tensor]:
    """Reads the initial state of every layer from a state file or a merged model.

    Returns:
        `blocks.{i}.att.time_state` -> [H, N, N] (head, value, key), in layer order, in the file's dtype.

    Raises:
        CheckpointError: The file cannot be read, or its states do not fit a model of this shape, or
            a value is not finite.
    """
    file, outlines = _states_in(path)
    expected = shape.state_shapes()
    if outlines.keys() != expected.keys():
        missing = [key for key in expected if key not in outlines]
        superfluous = [key for key in outlines if key not in expected]
        problems = [f"lacks {missing[0]}{_and_more(missing)}"] if missing else []
        problems += [f"also has {superfluous[0]}{_and_more(superfluous)}"] if superfluous else []
        raise CheckpointError(
            f"{path} holds the time_state of {len(outlines)} layers, but the model has {shape.n_layer} "
            f"layers: it {' and '.join(problems)}; name the model that it was trained on, or a state of this one"
        )
    for key, wanted in expected.items():
        if tuple(outlines[key].shape) != wanted:
            raise CheckpointError(
                f"{path}: {key} has shape {list(outlines[key].shape)}, but the model needs {list(wanted)} "
                "(heads, head size, head size): name the model that the state was trained on, or a state of this one"
            )
    tensors = {key: file.read(outlines[key]).contiguous() for key in expected}
    _refuse_non_finite(path, tensors)
    return tensors


def read_states(path: PathLike) -> dict[str, Tensor]:
    """The states of a state file or merged model, whatever model they belong to.

    Returns:
        As `load_state`.

    Raises:
        CheckpointError: The file cannot be read, holds other things, lacks a layer, or holds what are no square
            matrices of one size, or a value that is not finite.
    """
    file, outlines = _states_in(path)
    keys = [state_key(layer) for layer in range(len(outlines))]
    missing = [key for key in keys if key not in outlines]
    if missing:
        raise CheckpointError(
            f"{path} holds the time_state of {len(outlines)} layers, but lacks {missing[0]}: copy or download it again"
        )
    wanted = tuple(outlines[keys[0]].shape)
    for key in keys:
        shape = tuple(outlines[key].shape)
        if len(shape) != 3 or 0 in shape or shape[1] != shape[2] or shape != wanted:
            raise CheckpointError(
                f"{path}: {key} has shape {list(shape)}, expected [heads, head size, head size], the same in all "
                f"layers: {_ANOTHER_STATE}"
            )
    tensors = {key: file.read(outlines[key]).contiguous() for key in keys}
    _refuse_non_finite(path, tensors)
    return tensors


def save_state(path: PathLike, states: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a state file: the L keys `blocks.{i}.att.time_state` and nothing else, atomically.

    Args:
        states: key -> [H, N, N] (head, value, key) of every layer, on any device, in any float dtype.
        dtype: dtype in the file; inference clients expect 16 bits.

    Raises:
        CheckpointError: A value is not finite in `dtype`, or the file cannot be written. An existing
            file is then unchanged.
    """
    keys = [state_key(layer) for layer in range(len(states))]
    assert keys, "no states to save"
    assert set(keys) == set(states), f"not the states of {len(states)} layers: {sorted(states)}"
    tensors = {key: _own_copy(states[key], dtype) for key in keys}
    heads, size, _ = tensors[keys[0]].shape
    assert all(tuple(tensor.shape) == (heads, size, size) for tensor in tensors.values())
    _refuse_non_finite(path, tensors)
    storage.save(path, tensors)


def read_tensors(path: PathLike, role: str) -> dict[str, Tensor]:
    """The tensors of a file by key without prefix.

    Args:
        role: what the file should be, for messages: "adapter file".

    Raises:
        CheckpointError: The file cannot be read, or a value is no floating-point tensor, or not finite.
    """
    file, content = _opened(path, role)
    tensors: dict[str, Tensor] = file.whole(_float_tensors(path, content))
    _refuse_non_finite(path, tensors)
    return tensors


def keys_in(path: PathLike, role: str) -> list[str]:
    """The keys of a file without prefixes; its tensors are not read.

    Raises:
        CheckpointError: see `read_tensors`.
    """
    _, content = _opened(path, role)
    return list(_float_tensors(path, content))


def save_tensors(path: PathLike, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes tensors by key, atomically.

    Raises:
        CheckpointError: A value is not finite in `dtype`, or the file cannot be written. An existing
            file is then unchanged.
    """
    copies = {key: _own_copy(tensor, dtype) for key, tensor in tensors.items()}
    _refuse_non_finite(path, copies)
    storage.save(path, copies)


def save_model(path: PathLike, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a complete model with standard keys in file order, atomically.

    Args:
        tensors: every weight by key; `time_state` of all layers or of none.
        dtype: dtype in the file.

    Raises:
        CheckpointError: The file cannot be written. An existing file is then unchanged.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    problems = shape_of(shapes).key_problems(shapes)
    assert not problems, problems
    storage.save(path, {key: _own_copy(tensor, dtype) for key, tensor in tensors.items()})


def _states_in(path: PathLike) -> tuple[storage.TensorFile, dict[str, Tensor]]:
    """A state file or merged model, and its `time_state` tensors without bytes, in no order."""
    file, content = _opened(path, "state file")
    states = {key: value for key, value in content.items() if key.endswith(_STATE_SUFFIX)}
    if not states:
        whole = ", it is a whole model, which --load_model takes as it is" if "emb.weight" in content else ""
        if any(key.endswith(_ADAPTER_SUFFIXES) for key in content):
            whole = ", it is an adapter, for --load_adapter"
        raise CheckpointError(
            f"{path} holds no blocks.*.att.time_state{whole}; a state file written by this program, or a merged "
            "model, is needed here"
        )
    others = [key for key in content if key not in states]
    if others and "emb.weight" not in content:
        raise CheckpointError(
            f"{path} holds {others[0]}{_and_more(others)} beside the time_state of {len(states)} layers; "
            f"a state file holds nothing else: {_ANOTHER_STATE}"
        )
    return file, _float_tensors(path, states)


def _opened(path: PathLike, role: str) -> tuple[storage.TensorFile, dict[str, Any]]:
    """A file and the dict in it, keys without prefix, tensors without bytes.

    Args:
        role: what the file should be, for messages: "model file" or "state file".
    """
    file = storage.TensorFile(path, role)
    content = file.content
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not {storage.one(role)}'s dict of names and tensors: name "
            "another file"
        )
    if not content:
        raise CheckpointError(f"{path} is an empty dict, not {storage.one(role)}: name another file")
    stripped: dict[str, Any] = {}
    for key, value in content.items():
        name = _strip_prefix(key)
        if name in stripped:
            raise CheckpointError(f"{path} holds {name} twice, with and without a prefix; keep one of them")
        stripped[name] = value
    return file, stripped


def _in_hf_form(path: PathLike) -> Mapping[str, Any]:
    """What a safetensors file holds if it is one that is read; nothing otherwise, so that it is refused by its name."""
    path = Path(path)
    if not path.is_dir() and not (path.name.endswith((".safetensors", ".safetensors.index.json")) and path.is_file()):
        return {}
    content = safetensors.load_model(path)
    return content if with_own_names(content) is not content else {}


def _strip_prefix(key: str) -> str:
    """The key without leading prefixes, in any order."""
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return key


def _float_tensors(path: PathLike, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """`content`, all of it dense floating-point tensors."""
    tensors = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, expected a tensor: name another file")
        if value.dtype not in _FLOAT_DTYPES or value.layout != torch.strided:
            hint = " (packed by quantisation?)" if value.dtype in (torch.uint8, torch.int8) else ""
            raise CheckpointError(
                f"{path}: {key} is of {_dtype_name(value.dtype)}{hint}, expected a dense tensor of bfloat16, "
                "float16 or float32: name the file as it was before that, or another"
            )
        tensors[key] = value
    return tensors


def _refuse_non_finite(path: PathLike, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(
                f"{path}: {key} holds {bad} values that are not finite in {_dtype_name(tensor.dtype)}; they "
                "make every output NaN, use an earlier file"
            )


def _own_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy on the CPU: a view would drag the whole buffer it lies in into the file."""
    return tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
