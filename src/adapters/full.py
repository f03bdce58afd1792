"""Full training: every weight, of a model from a file or a fresh one. Start states stay as they are.

Weights are fp32; or the large ones bf16 (`narrow`), which an optimizer has to round stochastically.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.adapters.parts import value_count
from src.adapters.plan import AdapterPlan
from src.adapters.ready import chat_command, next_lines
from src.adapters.states import state_tensors
from src.checkpoint import FILE_VALUE_BYTES, save_model
from src.identity import FileIdentity
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.system import command_here


class FullTraining:
    """See `method.Method`.

    Args:
        layerwise_rates: whether parameters have rates of their own, see `ModelShape.rate_factor`.
        narrow: whether matrices, embedding and head are kept in bf16.
        in_backward: whether gradients are used up in the backward.
        engine_has_masters: whether an engine keeps fp32 values beside narrow weights, which then are not rounded by
            chance.
    """

    small = False
    recordable = True
    in_place = True
    freezes_matrices = False
    adapters: AdapterPlan | None = None

    def __init__(
        self,
        *,
        layerwise_rates: bool = True,
        narrow: bool = False,
        in_backward: bool = False,
        engine_has_masters: bool = False,
    ) -> None:
        self._layerwise_rates = layerwise_rates
        self._narrow = narrow
        self._in_backward = in_backward
        self._engine_has_masters = engine_has_masters

    def trained_names(self, shape: ModelShape) -> list[str]:
        """See Method."""
        return [name for name in shape.parameter_shapes() if name not in shape.idle_names()]

    def narrow_names(self, shape: ModelShape) -> list[str]:
        """Keys of those that are kept in bf16; all where fp32 masters stand beside them."""
        if not self._narrow:
            return []
        return self.trained_names(shape) if self._engine_has_masters else self._large_names(shape)

    def _large_names(self, shape: ModelShape) -> list[str]:
        return ["emb.weight", *shape.matrix_names(), "head.weight"]

    def rate_factor(self, shape: ModelShape, name: str) -> float:
        """See Method."""
        return shape.rate_factor(name) if self._layerwise_rates else 1.0

    def describe(self, shape: ModelShape) -> str:
        """See Method."""
        lines = [f"all {shape.parameter_count:,} weights"]
        if self._narrow:
            sizes = shape.parameter_shapes()
            narrow = value_count({name: sizes[name] for name in self._large_names(shape)})
            lines.append(
                "they and their gradients are bf16, and DeepSpeed has fp32 masters beside them"
                if self._engine_has_masters
                else f"{narrow:,} of them (matrices, embedding, head) and their gradients are bf16, updates are "
                "rounded stochastically; the others are fp32"
            )
        if self._in_backward:
            lines.append(
                "each layer is updated in the backward: gradients are clipped by the norm of the step before (the "
                "first step's are not), and one that is not finite stops before its layer"
            )
        return "\n           ".join(lines)

    def file_bytes(self, shape: ModelShape) -> int:
        """See Method."""
        return shape.parameter_count * FILE_VALUE_BYTES

    def properties(self, shape: ModelShape) -> dict[str, Any]:
        """See Method."""
        return {"method": "full"}

    def check_files(self, shape: ModelShape, base: FileIdentity | None) -> None:
        """See Method."""

    def start(self, shape: ModelShape, folder: Path, base: FileIdentity | None) -> Mapping[str, Tensor]:
        """See Method."""
        return {}

    def begin(self, model: LanguageModel, folder: Path, base: FileIdentity | None, start: Mapping[str, Tensor]) -> None:
        """See Method."""

    def save(self, model: LanguageModel, path: Path) -> None:
        """Writes the whole model in bf16, start states only if it has any."""
        save_whole(model, {name: model.get_parameter(name).detach() for name in model.shape.parameter_shapes()}, path)

    def next_steps(self, base: str, result: Path, folder: str, template: str | None, merged_note: str) -> list[str]:
        """See Method."""
        return steps_after_whole(result, folder, template)


def save_whole(model: LanguageModel, weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes a model in bf16, atomically, with its start states if it has any.

    Args:
        model: has the states.
        weights: all others, by key.
        path: of the file.

    Raises:
        CheckpointError: it cannot be written.
    """
    states = state_tensors(model)
    save_model(path, {**weights, **(states if any(state.any() for state in states.values()) else {})}, torch.bfloat16)


def steps_after_whole(result: Path, folder: str, template: str | None, note: str = "") -> list[str]:
    """Lines that say what to do with a file that is a model, and what clients leave out of it."""
    training = ["train.py", "--load_model", str(result), "--data_file", "YOUR.jsonl"]
    lines = next_lines(
        [
            ("chat with it", chat_command(str(result), template)),
            ("tune a state on it", command_here(*training, "--proj_dir", folder.rstrip("/") + "-state")),
        ],
        "" if note else "; clients take it as it is",
    )
    return [*lines, *([f"           {note}"] if note else [])]
