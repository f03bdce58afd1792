"""Full training: every weight in fp32, of a model from a file or a fresh one. Start states stay as they are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.adapters.plan import AdapterPlan
from src.adapters.ready import chat_command
from src.adapters.states import state_tensors
from src.checkpoint import FILE_VALUE_BYTES, save_model
from src.identity import FileIdentity
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape


class FullTraining:
    """See `method.Method`.

    Args:
        layerwise_rates: whether parameters have rates of their own, see `ModelShape.rate_factor`.
    """

    small = False
    recordable = False
    freezes_matrices = False
    adapters: AdapterPlan | None = None

    def __init__(self, *, layerwise_rates: bool = True) -> None:
        self._layerwise_rates = layerwise_rates

    def trained_names(self, shape: ModelShape) -> list[str]:
        """See Method."""
        return [name for name in shape.parameter_shapes() if name not in shape.idle_names()]

    def rate_factor(self, shape: ModelShape, name: str) -> float:
        """See Method."""
        return shape.rate_factor(name) if self._layerwise_rates else 1.0

    def describe(self, shape: ModelShape) -> str:
        """See Method."""
        return f"all {shape.parameter_count:,} weights"

    def file_bytes(self, shape: ModelShape) -> int:
        """See Method."""
        return shape.parameter_count * FILE_VALUE_BYTES

    def properties(self, shape: ModelShape) -> dict[str, Any]:
        """See Method."""
        return {"method": "full"}

    def start(self, shape: ModelShape, folder: Path, base: FileIdentity | None) -> Mapping[str, Tensor]:
        """See Method."""
        return {}

    def begin(self, model: LanguageModel, folder: Path, base: FileIdentity | None, start: Mapping[str, Tensor]) -> None:
        """See Method."""

    def save(self, model: LanguageModel, path: Path) -> None:
        """Writes the whole model in bf16, start states only if it has any."""
        states = state_tensors(model)
        weights = {name: model.get_parameter(name).detach() for name in model.shape.parameter_shapes()}
        save_model(path, weights | (states if any(state.any() for state in states.values()) else {}), torch.bfloat16)

    def next_steps(self, base: str, result: Path, folder: str, template: str) -> list[str]:
        """See Method."""
        return [
            "next       chat with it; tune a state on it; clients take it as it is:",
            f"           {chat_command(str(result), template)}",
            f"           python train.py --load_model {shlex.quote(str(result))} --data_file YOUR.jsonl "
            f"--proj_dir {shlex.quote(folder.rstrip('/') + '-state')}",
        ]
