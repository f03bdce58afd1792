"""Models with what was trained put in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src import safetensors, storage
from src.adapters.hf import CONFIG_FILE, TENSOR_FILE, write_hf
from src.adapters.trained import Told, Trained, read_trained
from src.checkpoint import Checkpoint, open_checkpoint
from src.config.model import quant_name
from src.errors import CheckpointError, ConfigError
from src.identity import FileIdentity
from src.model.rwkv7 import hf_name, hf_tensor
from src.model.shape import ModelShape
from src.quant import DequantizationWorkspace, FrozenLinear
from src.storage import PathLike
from src.streaming import save_one_by_one


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        base: the base model.
        trained: what was put in.
        replaced_state: whether the base already had a state, now replaced.
        size_bytes: size of the written file.
    """

    base: Checkpoint
    trained: Trained
    replaced_state: bool
    size_bytes: int

    @property
    def shape(self) -> ModelShape:
        """Sizes of the base model."""
        return self.base.info.shape

    @property
    def base_dtype(self) -> str:
        """dtype of the base model's weights, as in CheckpointInfo."""
        return self.base.info.dtype

    @property
    def state_dtype(self) -> str:
        """dtype of the merged state; "" if there is none."""
        return next((str(state.dtype).removeprefix("torch.") for state in self.trained.states.values()), "")


class Merged(Mapping[str, Tensor]):
    """The tensors of a model with what was trained put in, each made when it is asked for.

    A matrix with an adapter is merged in fp32 and rounded once, to the dtype it has in the base model; a state keeps
    the dtype of its file; everything else is the base model's own tensor.

    Args:
        base: the base model.
        trained: what is put in.
        quant: quantisation that the matrices with an adapter are packed in and unpacked from first; "none" is none.
        device: where matrices are computed.
    """

    def __init__(
        self, base: Checkpoint, trained: Trained, quant: str = "none", device: torch.device | str = "cpu"
    ) -> None:
        self._base, self._trained, self._quant, self._device = base, trained, quant, device
        self._keys = list({**base.outlines, **trained.states})

    def __getitem__(self, key: str) -> Tensor:
        trained = self._trained
        if key in trained.states:
            return trained.states[key]
        dtype = self._base.outlines[key].dtype
        if key in trained.adapters:
            merged = trained.adapters[key].merged(self.frozen(key)).to("cpu", dtype)
        elif key in trained.weights:
            merged = trained.weights[key].to(dtype)
        else:
            return self._base[key]
        if not torch.isfinite(merged).all():
            raise CheckpointError(
                f"{key} holds values that are not finite once {trained.path} is merged into {dtype}: one of the two "
                "files is damaged, or the numbers are too large for this type"
            )
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def frozen(self, key: str) -> Tensor:
        """What stood frozen beside an adapter, fp32 [out, in] on the device."""
        weights = self._trained.weights
        weight = weights[key] if key in weights else self._base[key]
        wide = self._trained.adapters[key].frozen(weight.to(self._device, torch.float32))
        if self._quant == "none":
            return wide
        packed = FrozenLinear.from_weight(wide, self._quant, torch.float32, workspace=DequantizationWorkspace())
        return packed.dequantized()

    def outlines(self) -> dict[str, Tensor]:
        """Key -> dtype and shape, as a tensor without values."""
        states = self._trained.states
        sources = ((key, states[key] if key in states else self._base.outlines[key]) for key in self._keys)
        return {key: torch.empty(source.shape, dtype=source.dtype, device="meta") for key, source in sources}


class Apart(Mapping[str, Tensor]):
    """A merged model's tensors, but what stood frozen beside adapters where there are some."""

    def __init__(self, merged: Merged, trained: Trained) -> None:
        self._merged, self._trained = merged, trained

    def __getitem__(self, key: str) -> Tensor:
        return self._merged.frozen(key) if key in self._trained.adapters else self._merged[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)


class InHFForm(Mapping[str, Tensor]):
    """A merged RWKV-7 model under the names of Hugging Face's form, each tensor made when it is asked for.

    What layer 0 holds and nothing uses has no place there.

    Raises:
        CheckpointError: There is no such form of the model.
    """

    def __init__(self, merged: Merged, shape: ModelShape, trained: Trained) -> None:
        if shape.architecture != "x070":
            raise CheckpointError(
                f"Hugging Face's form (.safetensors) is written of RWKV-7, and this is {shape.family}: let OUTPUT end "
                "in .pth"
            )
        if any(key in merged for key in shape.state_shapes()):
            raise CheckpointError(
                "Hugging Face's form (.safetensors) of a model has no place for a start state: let OUTPUT end in .pth"
            )
        self._merged = merged
        self._own = {hf_name(key): key for key in merged if key not in shape.idle_names()}

    def __getitem__(self, key: str) -> Tensor:
        return hf_tensor(self._own[key], self._merged[self._own[key]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def merge(
    base_path: PathLike,
    file_path: PathLike,
    output_path: PathLike,
    told: Told | None = None,
    *,
    quant: str = "none",
    device: torch.device | str = "cpu",
) -> MergeReport:
    """Writes a copy of the base model with a state, an adapter, further weights, or all of them put in.

    Every other tensor is copied bit for bit, in its dtype; a state that the base already has is replaced. Key prefixes
    are taken off, because inference clients do not know them. Tensors go from the base to the output one by
    one, so that host memory stays near one matrix. An output that ends in `.safetensors` is an RWKV-7 model in
    Hugging Face's form.

    Args:
        base_path: the base model.
        file_path: what was trained on it, see `read_trained`.
        output_path: the model to write.
        told: what the user says of the file.
        quant: see `Merged`.
        device: see `Merged`.

    Raises:
        CheckpointError: An input cannot be used, they do not fit each other, or the output cannot be written. Nothing
            is then written.
        ConfigError: The output exists or is one of the inputs, or `quant` is not what the file was trained on.
    """
    base, trained = open_inputs(base_path, file_path, output_path, {"output": output_path}, told)
    check_quant(trained, quant)
    merged = Merged(base, trained, quant, device)
    if Path(output_path).suffix == ".safetensors":
        safetensors.save(Path(output_path), InHFForm(merged, base.info.shape, trained))
    else:
        save_one_by_one(output_path, merged.outlines(), merged.__getitem__)
    return MergeReport(
        base=base,
        trained=trained,
        replaced_state=base.info.has_state and bool(trained.states),
        size_bytes=os.path.getsize(output_path),
    )


class Exported(NamedTuple):
    """What was written for `peft`.

    Attributes:
        trained: what it was made of.
        names: what a model that takes it calls its matrices.
    """

    trained: Trained
    names: str

    def lines(self, folder: str) -> Iterator[tuple[str, str]]:
        """(subject, sentence) of what the user should know."""
        yield "exported", self.trained.describe()
        yield "written", f"{folder}/adapter_model.safetensors, adapter_config.json"
        yield "next", f"peft.PeftModel.from_pretrained takes the folder, on a model with {self.names}"
        if self.trained.beside:
            yield "note", f"it was trained beside {self.trained.beside}, whose states are not in it"


def export_hf(base_path: PathLike, file_path: PathLike, output_path: PathLike, told: Told | None = None) -> Exported:
    """Writes an adapter as a folder that Hugging Face's `peft` reads.

    PiSSA becomes a LoRA of twice the rank, beside the whole base model. Names are those of Hugging Face's form of
    RWKV-7, and RWKV's own for RWKV-6, which has no such form here.

    Args:
        base_path: the base model.
        file_path: LoRA, PiSSA or Bone.
        output_path: the folder.
        told: what the user says of the file.

    Raises:
        CheckpointError: as `merge`; or the file holds what such a folder has no place for.
    """
    folder = Path(output_path)
    files = {"the tensors": folder / TENSOR_FILE, "the configuration": folder / CONFIG_FILE}
    base, trained = open_inputs(base_path, file_path, output_path, files, told)
    in_hf_form = base.info.shape.architecture == "x070"
    beside = [*trained.weights, *trained.states]
    if not trained.adapters or trained.kind == "bat":
        what = "a Bat, which peft computes otherwise" if trained.adapters else "no adapter"
        raise CheckpointError(f"{file_path} holds {what}, so --export hf cannot write it: merge it instead")
    if beside:
        raise CheckpointError(
            f"{file_path} holds {len(beside)} tensors beside its adapter, {beside[0]} among them, which peft has no "
            "place for: merge it instead, or train with --train_parts []"
        )
    if Path(output_path).is_file():
        raise CheckpointError(f"the output {output_path} is a file, and --export hf writes a folder: give another name")
    tensors: dict[str, Tensor] = {}
    for key, adapter in trained.adapters.items():
        module = key.removesuffix(".weight")
        parameters = dict(adapter.parameters)
        if adapter.first is not None:
            a, b = adapter.first
            parameters["lora_A"] = torch.cat([parameters["lora_A"].float(), a.float()])
            parameters["lora_B"] = torch.cat([parameters["lora_B"].float(), -b.float()], dim=1)
        for name, tensor in parameters.items():
            own = f"{module}.{name}"
            tensors[hf_name(own) if in_hf_form else own] = tensor.contiguous()
    r = trained.r * (2 if trained.kind == "pissa" else 1)
    write_hf(Path(output_path), tensors, r=r, alpha=trained.scale * r, base=Path(base_path).name)
    return Exported(trained, "names of Hugging Face's form (fla, rwkv7-hf)" if in_hf_form else "RWKV's own names")


def open_inputs(
    base_path: PathLike, file_path: PathLike, output_path: PathLike, files: Mapping[str, PathLike], told: Told | None
) -> tuple[Checkpoint, Trained]:
    """The base model, and what was trained on it; `files` are those that will be written.

    Raises:
        CheckpointError, ConfigError: as `merge`.
    """
    told = told or Told()
    inputs = {"base model": base_path, "trained file": file_path, "init file": told.init}
    storage.refuse_overlap(inputs, {"output": output_path})
    storage.refuse_existing(files)
    base = open_checkpoint(base_path)
    trained = read_trained(file_path, base.info.shape, told)
    if trained.adapters or trained.weights:
        _refuse_other_base(base_path, trained)
    return base, trained


def check_quant(trained: Trained, quant: str) -> None:
    """Refuses a quantisation that is not the one a file was trained on.

    Raises:
        ConfigError: naming both.
    """
    if quant == "none":
        return
    if not trained.adapters:
        raise ConfigError(f"--quant {quant} says nothing about {trained.path}, which holds no adapter: leave it out")
    if (trained_on := trained.quant) not in (None, quant_name(quant)):
        on = "weights that were not packed" if trained_on == "none" else trained_on
        raise ConfigError(f"--quant {quant}, but {trained.path} was trained on {on}: leave it out, or use --quant none")


def _refuse_other_base(path: PathLike, trained: Trained) -> None:
    """Compares size and SHA-256 of the base model with what the training noted.

    Raises:
        CheckpointError: they differ.
    """
    if "size_bytes" not in trained.base:
        return
    identity = FileIdentity(Path(path))
    found = {"size_bytes": identity.size_bytes}
    if "sha256" in trained.base and identity.size_bytes == trained.base["size_bytes"]:
        found["sha256"] = identity.sha256  # type: ignore[assignment]
    for name, value in found.items():
        if trained.base.get(name, value) != value:
            raise CheckpointError(
                f"{trained.path} was trained on {trained.base.get('file', 'a base model')} with {name} "
                f"{trained.base[name]}, and {path} has {value}: give the model it was trained on"
            )
