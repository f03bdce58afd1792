"""Files of trained tensors: adapters, parts and states together, and PiSSA's first factors.

Keys are RWKV-PEFT's, values bf16 (first factors: fp32). What was trained how stands in a JSON file beside each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from src import storage
from src.adapters.plan import AdapterPlan, init_key
from src.checkpoint import read_tensors, save_tensors
from src.config.flags import shortened
from src.errors import CheckpointError
from src.identity import FileIdentity
from src.model.shape import ModelShape, Shape
from src.storage import PathLike

INIT_FILE = "init_pissa.pth"

_NUMBER = (int, float)
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("method", "architecture", "quant", "file", "sha256", "base_sha256"), (str, "a text")),
    **dict.fromkeys(("r", "svd_niter", "size_bytes", "base_size_bytes"), (int, "a whole number")),
    **dict.fromkeys(("alpha", "scale"), (_NUMBER, "a number")),
    **dict.fromkeys(("states", "quant_head"), (bool, "true or false")),
    "base": ((dict, type(None)), "an object or null"),
    "flags": (dict, "an object"),
    "load_state": (str, "a text"),
}
"""Of the values in such a file that somebody reads, what they are, and in words."""
_SYNONYMS = {".disha": ".bone"}
_Value = TypeVar("_Value")


def load_trained(path: PathLike, trained: Mapping[str, Shape], adapters: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Tensors of a file of an earlier run, to go on with; those of adapters must all be there.

    Args:
        path: as this program or RWKV-PEFT wrote it.
        trained: key -> shape of everything that this run trains.
        adapters: those of them that belong to adapters.

    Raises:
        CheckpointError: The file cannot be read, holds what is not trained here, lacks an adapter, or does not fit.
    """
    tensors = with_own_names(read_tensors(path, "adapter file"))
    foreign = [key for key in tensors if key not in trained]
    if foreign:
        raise CheckpointError(
            f"{path} holds {len(foreign)} of {len(tensors)} tensors that this run does not train, {foreign[0]} among "
            "them: give the --peft, --targets, --train_parts and --train_type it was made with"
        )
    missing = [key for key in adapters if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(adapters)} adapter tensors that this run trains, {missing[0]} among "
            "them: give the --peft and --targets it was made with"
        )
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != trained[key]:
            raise CheckpointError(
                f"{path}: {key} has shape {list(tensor.shape)}, and this run needs {list(trained[key])}: give the "
                "model, the method and the r it was made with"
            )
    return tensors


_OTHERS = {
    "states": "--load_state", "full": "--load_model", "lisa": "--load_model", "parts": "--load_adapter without --peft",
}  # fmt: skip
"""The flag for what methods make that are none of --peft's adapters."""


def check_description(path: PathLike, method: str, properties: Mapping[str, Any], base: FileIdentity) -> None:
    """Compares what the JSON beside a file says with this run; without JSON there is nothing to compare.

    Raises:
        CheckpointError: it was made by another method, scale or r, or on another base model.
    """
    said, beside = said_beside(path), description_path(path)
    if said is None:
        return
    if said.get("method", method) != method:
        if flag := _OTHERS.get(said["method"]):
            raise CheckpointError(f"{path} is no adapter ({beside.name}): give it as {flag}")
        raise CheckpointError(f"{path} was made with --peft {said['method']} ({beside.name}), not {method}: use that")
    wrong = [name for name in ("r", "alpha", "scale") if said.get(name, properties.get(name)) != properties.get(name)]
    if wrong:
        raise CheckpointError(
            f"{path} was made with {wrong[0]} {said[wrong[0]]} ({beside.name}), and this run has "
            f"{properties.get(wrong[0])}: use the same"
        )
    made_on = said.get("base") or {}
    if made_on.get("size_bytes", base.size_bytes) != base.size_bytes:
        raise CheckpointError(
            f"{path} was made on {made_on.get('file')} of {made_on['size_bytes']} bytes ({beside.name}), and "
            f"--load_model has {base.size_bytes}: it only fits the model it was trained on"
        )
    if "sha256" in made_on and made_on["sha256"] != base.sha256:
        raise CheckpointError(
            f"{path} was made on {made_on.get('file')} with SHA-256 {made_on['sha256'][:12]}… ({beside.name}), and "
            f"--load_model has {base.sha256[:12]}…: it only fits the model it was trained on"
        )


def refuse_other_architecture(path: PathLike, shape: ModelShape) -> None:
    """States, and many adapters, have the same names and sizes in every architecture: the JSON beside one tells.

    Raises:
        CheckpointError: it names another architecture than the model's.
    """
    said = (said_beside(path) or {}).get("architecture") or shape.architecture
    if said != shape.architecture:
        raise CheckpointError(
            f"{path} was trained on an {said} model ({description_path(path).name}), and the base model is "
            f"{shape.family}: it only fits the model it was trained on"
        )


def load_first_factors(path: PathLike, plan: AdapterPlan, shape: ModelShape, base: FileIdentity) -> dict[str, Tensor]:
    """PiSSA's first factors by their keys; their JSON is compared, where there is one.

    Raises:
        CheckpointError: The file cannot be read, belongs to another base model, r or niter, or lacks or adds a key.
    """
    tensors = read_tensors(path, "init file of PiSSA")
    expected = {init_key(key): size for key, size in plan.parameter_shapes(shape).items()}
    said = said_beside(path)
    if said is not None:
        for name, value in _origin(plan, base).items():
            if said.get(name) != value:
                raise CheckpointError(
                    f"{path} was made with {name} {said.get(name)} ({description_path(path).name}), and this run has "
                    f"{value}: use the model and flags it was made with, or another --proj_dir"
                )
    if tensors.keys() != expected.keys():
        missing, foreign = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(expected)} first factors and holds {len(foreign)} others: give the "
            "model and --targets it was made with"
        )
    for key, size in expected.items():
        if tuple(tensors[key].shape) != size:
            raise CheckpointError(
                f"{path}: {key} has shape {list(tensors[key].shape)}, and this run needs {list(size)}: give the model "
                "and the --pissa_r it was made with"
            )
    return tensors


def save_first_factors(path: Path, factors: Mapping[str, Tensor], plan: AdapterPlan, base: FileIdentity) -> None:
    """Writes PiSSA's first factors, fp32, by their keys, and the JSON beside them.

    Raises:
        CheckpointError: they cannot be written.
    """
    save_tensors(path, factors, torch.float32)
    write_description(description_path(path), _origin(plan, base))


def description_path(path: PathLike) -> Path:
    """The JSON file beside a file of tensors."""
    return Path(path).with_suffix(".json")


def said_beside(path: PathLike) -> dict[str, Any] | None:
    """What the JSON file beside a file of tensors says; None where there is none.

    Raises:
        CheckpointError: it cannot be read, is no JSON object, or a value in it is not of its kind.
    """
    if not Path(path).name:  # "." or "/", which whoever reads it refuses
        return None
    beside = description_path(path)
    # Not Path.exists: a name that is too long with another suffix is no name of a file.
    if beside == Path(path) or not os.path.exists(beside):
        return None
    said = read_description(beside)
    base, flags = said.get("base"), said.get("flags")
    read = [*said.items(), *(base.items() if isinstance(base, dict) else ())]
    read += [("load_state", flags.get("load_state", ""))] if isinstance(flags, dict) else []
    for problem in filter(None, (problem_of(name, value) for name, value in read)):
        raise CheckpointError(f"{beside}: {problem}: correct it, or remove the file to go on without what it says")
    return said


def states_beside(said: Mapping[str, Any] | None) -> str:
    """The file of states that a training had beside what it trained, by what `said_beside` gave; "" is none."""
    if said is None or said.get("states"):
        return ""
    return str(said.get("flags", {}).get("load_state", ""))


def read_description(path: Path) -> dict[str, Any]:
    """What stands in such a JSON file.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove it to go on without what it says") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: remove it to go on without what it says")
    return content


def write_description(path: Path, content: Mapping[str, Any]) -> None:
    """Writes such a file, atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with storage.replacing(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def problem_of(name: str, value: Any) -> str:
    """What is wrong with a value of such a file; "" is nothing, as of what nobody reads."""
    kind, words = _KINDS.get(name, (object, ""))
    fits = isinstance(value, kind)
    if kind in (int, _NUMBER):  # JSON's true is a whole number to Python, and its NaN is no scale
        fits = fits and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return "" if fits else f"{name} is {shortened(json.dumps(value))}, expected {words}"


def _origin(plan: AdapterPlan, base: FileIdentity) -> dict[str, Any]:
    """What first factors depend on."""
    return {"r": plan.r, "svd_niter": plan.niter, "base_size_bytes": base.size_bytes, "base_sha256": base.sha256}


def with_own_names(tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """Tensors, or what stands for them, by this program's keys, whatever a writer calls them."""
    named = {}
    for key, tensor in tensors.items():
        suffix = key[key.rfind(".") :]
        named[key.removesuffix(suffix) + _SYNONYMS.get(suffix, suffix)] = tensor
    return named
