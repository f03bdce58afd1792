"""Folders of Hugging Face's `peft`: `adapter_model.safetensors` beside `adapter_config.json`.

Names are RWKV's own, or those of an RWKV-7 model in Hugging Face's form (`layers.0.attn.k_proj`).

What stands there under LORA is LoRA, and under MISS is Bone, in the same orientation: `lora_A.weight` [r, in],
`lora_B.weight` [out, r], `miss_block` [r, out].
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from src import safetensors
from src.adapters.files import problem_of, read_description, write_description
from src.errors import CheckpointError
from src.model.rwkv7 import own_name

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_OWN_NAMES = (
    (re.compile(r"\.(lora_[AB])(?:\.default)?(?:\.weight)?$"), r".\1"),
    (re.compile(r"\.(?:miss_block|bone_block)(?:\.default)?$"), ".bone"),
)
_HF_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "bone": "miss_block"}

_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
}
"""Settings of `peft` and the values with which an adapter is what it is here."""

_PLAIN_STARTS = {
    "LORA": (None, True, False, "gaussian", "orthogonal", "eva"),
    "MISS": (None, True, False, "bat"),
    "BONE": (None, True, False, "bat"),
}
"""Values of `init_lora_weights` or `init_weights` that leave the base model as it is, and the formula."""


def is_hf(path: Path) -> bool:
    """Whether a path is such a folder, or the file of tensors in it."""
    return path.is_dir() or path.suffix == ".safetensors"


def read_hf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a folder by the keys they have here, and what its configuration says, as files here say it.

    Args:
        path: the folder, or the file of tensors in it; beside such a file the configuration may be missing.

    Raises:
        CheckpointError: a file cannot be read, or the adapter is of a kind that does not exist here.
    """
    folder = path if path.is_dir() else path.parent
    tensor_file = path / TENSOR_FILE if path.is_dir() else path
    config_file = folder / CONFIG_FILE
    if path.is_dir() and not (tensor_file.exists() and config_file.exists()):
        raise CheckpointError(
            f"{path} is a folder without {TENSOR_FILE if config_file.exists() else CONFIG_FILE}: name an adapter or "
            "state file, or a folder that peft wrote"
        )
    said = _said_by(config_file) if config_file.exists() else {}
    tensors = {}
    for key, tensor in safetensors.load(tensor_file, "adapter file").items():
        name = key.removeprefix(_PREFIX).removeprefix("model.")
        for theirs, ours in _OWN_NAMES:
            name = theirs.sub(ours, name)
        tensors[own_name(name)] = tensor
    return tensors, said


def write_hf(folder: Path, tensors: Mapping[str, Tensor], *, r: int, alpha: float, base: str) -> None:
    """Writes such a folder.

    Args:
        folder: created where it is missing.
        tensors: parameters of LoRA or Bone, contiguous, on the CPU, by `blocks.0.att.key.lora_A` or, in Hugging
            Face's form, `model.layers.0.attn.k_proj.lora_A`.
        r: rank.
        alpha: of LoRA, whose scale is alpha / r.
        base: name of the base model.

    Raises:
        CheckpointError: a file cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be made: {error.strerror}") from error
    named = {}
    for key, tensor in tensors.items():
        module, _, name = key.rpartition(".")
        named[f"{_PREFIX}{module}.{_HF_NAMES[name]}"] = tensor
    modules = {".".join(key.split(".")[-3:-1]): None for key in tensors}
    common = {
        "auto_mapping": None, "base_model_name_or_path": base, "bias": "none", "exclude_modules": None,
        "inference_mode": True, "layers_pattern": None, "layers_to_transform": None, "modules_to_save": None, "r": r,
        "revision": None, "target_modules": list(modules), "task_type": None,
    }  # fmt: skip
    if any(key.endswith(".bone") for key in tensors):
        special = {"peft_type": "MISS", "init_weights": True, "miss_dropout": 0.0, "mini_r": 1}
    else:
        special = {
            "peft_type": "LORA", "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": 0.0,
            "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
        }  # fmt: skip
    safetensors.save(folder / TENSOR_FILE, named)
    write_description(folder / CONFIG_FILE, {**special, **common})


def _said_by(path: Path) -> dict[str, Any]:
    """What a configuration says, in the words of the JSON files here.

    Raises:
        CheckpointError: it cannot be read, or names what does not exist here.
    """
    config = read_description(path)
    kind = str(config.get("peft_type"))
    starts = _PLAIN_STARTS.get(kind)
    if starts is None:
        raise CheckpointError(f"{path}: peft_type {kind} is unknown here: LORA, MISS and BONE can be read")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise CheckpointError(
                f"{path}: {name} is {json.dumps(config[name])}, which cannot be read here: merge it with peft itself"
            )
    start = config.get("init_lora_weights" if kind == "LORA" else "init_weights")
    if start not in starts:
        raise CheckpointError(
            f"{path}: its weights were started as {json.dumps(start)}, which changes the base model or the formula: "
            f"{'save it in peft as plain LoRA, or ' if kind == 'LORA' else ''}merge it there"
        )
    r = config.get("r")
    if not isinstance(r, int) or problem_of("r", r) or r < 1:
        raise CheckpointError(f"{path}: r is {json.dumps(r)}, expected a whole number from 1")
    said: dict[str, Any] = {"method": "lora" if kind == "LORA" else "bat" if start == "bat" else "bone", "r": r}
    if kind == "LORA":
        alpha = config.get("lora_alpha")
        if not isinstance(alpha, int | float) or problem_of("alpha", alpha):
            raise CheckpointError(f"{path}: lora_alpha is {json.dumps(alpha)}, expected a number")
        by_root = config.get("use_rslora", False)
        if by_root not in (True, False, None):
            raise CheckpointError(f"{path}: use_rslora is {json.dumps(by_root)}, expected true or false")
        said |= {"alpha": alpha, "scale": alpha / (r**0.5 if by_root else r)}
    if config.get("layers_to_transform") is not None:
        said["layers"] = config["layers_to_transform"]
    return said
