"""State tuning: the trained tensors are the model's `blocks.{i}.att.time_state` alone.

They are kept in fp32 whatever the computation's dtype, and saved in bf16.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from src.adapters.plan import AdapterPlan
from src.checkpoint import FILE_VALUE_BYTES, save_state
from src.identity import FileIdentity
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape


class StateTuning:
    """See `method.Method`."""

    small = True
    recordable = True
    freezes_matrices = True
    adapters: AdapterPlan | None = None

    def trained_names(self, shape: ModelShape) -> list[str]:
        """See Method."""
        return list(shape.state_shapes())

    def rate_factor(self, shape: ModelShape, name: str) -> float:
        """All states have one rate."""
        return 1.0

    def describe(self, shape: ModelShape) -> str:
        """See Method."""
        return f"{shape.state_parameter_count:,} state values; all weights frozen"

    def file_bytes(self, shape: ModelShape) -> int:
        """See Method."""
        return shape.state_parameter_count * FILE_VALUE_BYTES

    def properties(self, shape: ModelShape) -> dict[str, Any]:
        """See Method."""
        return {"method": "states"}

    def start(self, shape: ModelShape, folder: Path, base: FileIdentity | None) -> Mapping[str, Tensor]:
        """See Method."""
        return {}

    def begin(self, model: LanguageModel, folder: Path, base: FileIdentity | None, start: Mapping[str, Tensor]) -> None:
        """See Method."""

    def save(self, model: LanguageModel, path: Path) -> None:
        """See Method."""
        save_state(path, state_tensors(model))

    def next_steps(self, base: str, result: Path, folder: str) -> list[str]:
        """See Method."""
        return [
            "next       use the state file in a client that loads states, or make a model that contains it:",
            f"           python merge_state.py {shlex.join([base, str(result), str(Path(folder) / 'merged.pth')])}",
        ]


def state_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The model's start states, [H, value, key] fp32, detached, by file key."""
    return {name: model.get_parameter(name).detach() for name in model.shape.state_shapes()}
