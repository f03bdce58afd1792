"""Adapters, parts of the weights, and states, each of them or together; the rest is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.adapters.files import (
    INIT_FILE,
    check_description,
    load_first_factors,
    load_trained,
    save_first_factors,
)
from src.adapters.parts import described, value_count, weights_by_part
from src.adapters.plan import AdapterPlan, init_key
from src.adapters.ready import chat_command, export_command, merge_command, next_lines
from src.checkpoint import FILE_VALUE_BYTES, save_tensors
from src.errors import CheckpointError
from src.identity import FileIdentity
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape, Shape

_FIRST_FACTOR_BYTES = 4


@dataclass(frozen=True)
class Rates:
    """Factors on the schedule's rate.

    Attributes:
        states: of states.
        lora_b: of LoRA's B.
        layerwise: whether other weights have rates of their own, see `ModelShape.rate_factor`.
    """

    states: float = 1.0
    lora_b: float = 1.0
    layerwise: bool = True


class Tuning:
    """See `method.Method`.

    Args:
        adapters: which, or none.
        parts: of the names of further weights that are trained.
        states: whether states are.
        packed: whether the matrices are packed.
        packed_head: whether the head is.
        rates: factors on rates.
        load: file of an earlier run to go on from; "" is none.
        pissa_init: file of PiSSA's first factors; "" means `init_pissa.pth` beside `load`, or in the run's folder.
        beside: file of states that stay as they are; "" is none.
    """

    small = False
    in_place = False
    freezes_matrices = True

    def __init__(
        self,
        adapters: AdapterPlan | None,
        *,
        parts: tuple[str, ...] = (),
        states: bool = False,
        packed: bool = False,
        packed_head: bool = False,
        rates: Rates = Rates(),
        load: str = "",
        pissa_init: str = "",
        beside: str = "",
    ) -> None:
        self.adapters = adapters
        self.recordable = adapters is None or adapters.kind != "lora" or not adapters.dropout
        self._parts = parts
        self._states = states
        self._packed, self._packed_head = packed, packed_head
        self._rates = rates
        self._load, self._pissa_init = load, pissa_init
        self._beside = beside

    def trained_names(self, shape: ModelShape) -> list[str]:
        """See Method."""
        return list(self._trained_shapes(shape))

    def rate_factor(self, shape: ModelShape, name: str) -> float:
        """See Method."""
        if name in shape.state_shapes():
            return self._rates.states
        if name in shape.parameter_shapes():
            return shape.rate_factor(name) if self._rates.layerwise else 1.0
        return self._rates.lora_b if name.endswith(".lora_B") else 1.0

    def describe(self, shape: ModelShape) -> str:
        """See Method."""
        groups = []
        if self.adapters is not None:
            matrices = len(self.adapters.matrices(shape))
            groups.append(
                f"{self.adapters.describe()} on {matrices} matrices: {value_count(self._adapter_shapes(shape)):,}"
            )
        if self._states:
            groups.append(f"states: {shape.state_parameter_count:,}")
        groups += described(self._shapes_of_parts(shape))
        return f"{', '.join(groups)} values; all other weights frozen"

    def file_bytes(self, shape: ModelShape) -> int:
        """See Method."""
        size = value_count(self._trained_shapes(shape)) * FILE_VALUE_BYTES
        if self._is_pissa:
            size += value_count(self._adapter_shapes(shape)) * _FIRST_FACTOR_BYTES
        return size

    def properties(self, shape: ModelShape) -> dict[str, Any]:
        """See Method."""
        matrices = self.adapters.matrices(shape) if self.adapters is not None else []
        targets = dict.fromkeys(".".join(key.split(".")[2:-1]) for key in matrices)
        return {
            "method": self.adapters.kind if self.adapters is not None else "parts",
            **(self.adapters.properties() if self.adapters is not None else {}),
            "targets": list(targets),
            "train_parts": list(self._parts),
            "states": self._states,
        }

    def check_files(self, shape: ModelShape, base: FileIdentity | None) -> None:
        """See Method."""
        self._loaded(shape, base)
        if self._is_pissa and base is not None and (source := self._given_first_factors()) is not None:
            assert self.adapters is not None
            load_first_factors(source, self.adapters, shape, base)

    def start(self, shape: ModelShape, folder: Path, base: FileIdentity | None) -> Mapping[str, Tensor]:
        """See Method."""
        assert base is not None
        tensors = self._loaded(shape, base)
        if self._is_pissa:
            tensors |= self._known_first_factors(shape, folder, base)
        return tensors

    def begin(self, model: LanguageModel, folder: Path, base: FileIdentity | None, start: Mapping[str, Tensor]) -> None:
        """Writes the factors that PiSSA began with, for merging and for going on, unless they are there."""
        if self._is_pissa and not (folder / INIT_FILE).exists():
            assert self.adapters is not None
            assert base is not None
            first = {}
            for name in self._adapter_shapes(model.shape):
                key = init_key(name)
                first[key] = start[key] if key in start else model.get_parameter(name)
            save_first_factors(folder / INIT_FILE, first, self.adapters, base)

    def save(self, model: LanguageModel, path: Path) -> None:
        """See Method."""
        trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained.keys() == set(self.trained_names(model.shape))
        save_tensors(path, trained)

    def next_steps(self, base: str, result: Path, folder: str, template: str | None, merged_note: str) -> list[str]:
        """See Method."""
        note = merged_note if self._states or self._beside else ""
        beside = Path(self._beside) if self._beside else None
        tasks = [
            ("chat with it", chat_command(base, template, state=beside, adapter=result)),
            ("make a model that contains it", merge_command(base, result, folder)),
        ]
        if beside is not None:
            merged = str(Path(folder) / "merged.pth")
            command = merge_command(merged, beside, folder, "merged-with-states.pth")
            tasks.append(("put the states that it was trained beside into that", command))
        lines = next_lines(tasks, "" if note else ", which every client takes")
        lines += [f"           {note}"] if note else []
        if (
            self.adapters is not None
            and self.adapters.kind != "bat"
            and not (self._parts or self._states or self._beside)
        ):
            lines.append(f"           {export_command(result, Path(folder) / 'peft', 'hf', base)}")
        return lines

    def _loaded(self, shape: ModelShape, base: FileIdentity | None) -> dict[str, Tensor]:
        """What the run goes on with."""
        if not self._load:
            return {}
        assert base is not None
        properties = self.properties(shape)
        check_description(self._load, properties["method"], properties, base)
        return dict(load_trained(self._load, self._trained_shapes(shape), self._adapter_shapes(shape)))

    @property
    def _is_pissa(self) -> bool:
        return self.adapters is not None and self.adapters.kind == "pissa"

    def _known_first_factors(self, shape: ModelShape, folder: Path, base: FileIdentity) -> Mapping[str, Tensor]:
        """Those of the training that is continued, or of an earlier run in the folder; none if they are to be made.

        What is continued elsewhere gets a copy in its folder, for merging.
        """
        assert self.adapters is not None
        own = folder / INIT_FILE
        source = self._given_first_factors()
        if source is None and not own.exists():
            return {}
        source = source or own
        factors = load_first_factors(source, self.adapters, shape, base)
        if own.exists() and not own.samefile(source):  # a run that was interrupted has left its copy
            kept = load_first_factors(own, self.adapters, shape, base)
            if not all(torch.equal(kept[key], factors[key]) for key in factors):
                raise CheckpointError(
                    f"--proj_dir {folder} holds the {INIT_FILE} of another training: choose another folder"
                )
        return factors

    def _given_first_factors(self) -> Path | None:
        """The file of those of the training that is continued; None if none is, or one in the run's own folder."""
        if self._pissa_init:
            return Path(self._pissa_init)
        if not self._load:
            return None
        source = Path(self._load).with_name(INIT_FILE)
        if not source.exists():
            raise CheckpointError(
                f"{self._load} is PiSSA's, which needs the factors it began with, and there is no {source}: name that "
                "file with --pissa_config '{\"pissa_init\": ...}'"
            )
        return source

    def _trained_shapes(self, shape: ModelShape) -> dict[str, Shape]:
        states = shape.state_shapes() if self._states else {}
        parts = {name: size for shapes in self._shapes_of_parts(shape).values() for name, size in shapes.items()}
        return {**self._adapter_shapes(shape), **states, **parts}

    def _adapter_shapes(self, shape: ModelShape) -> dict[str, Shape]:
        return {} if self.adapters is None else self.adapters.parameter_shapes(shape)

    def _shapes_of_parts(self, shape: ModelShape) -> dict[str, dict[str, Shape]]:
        """Part -> the weights whose keys contain it; matrices with adapters are left out.

        Raises:
            ConfigError: it names nothing, or what is packed.
        """
        adapted = set(self.adapters.matrices(shape)) if self.adapters is not None else set()
        packed = set(shape.matrix_names()) if self._packed else set()
        packed |= {"head.weight"} if self._packed_head else set()
        return weights_by_part(self._parts, shape, adapted=adapted, packed=packed)
