"""State tuning: the trained tensors are the model's `blocks.{i}.att.time_state` alone.

They are kept in fp32 whatever the computation's dtype, and saved in bf16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.adapters.plan import AdapterPlan
from src.adapters.ready import chat_command, export_command, merge_command, next_lines
from src.checkpoint import FILE_VALUE_BYTES, save_state
from src.identity import FileIdentity
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape


class StateTuning:
    """See `method.Method`."""

    small = True
    recordable = True
    in_place = False
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

    def check_files(self, shape: ModelShape, base: FileIdentity | None) -> None:
        """See Method."""

    def start(self, shape: ModelShape, folder: Path, base: FileIdentity | None) -> Mapping[str, Tensor]:
        """See Method."""
        return {}

    def begin(self, model: LanguageModel, folder: Path, base: FileIdentity | None, start: Mapping[str, Tensor]) -> None:
        """See Method."""

    def save(self, model: LanguageModel, path: Path) -> None:
        """See Method."""
        save_state(path, state_tensors(model))

    def next_steps(self, base: str, result: Path, folder: str, template: str | None, merged_note: str) -> list[str]:
        """See Method."""
        return [
            *next_lines(
                [
                    ("chat with it", chat_command(base, template, state=result)),
                    ("make a model that contains it", merge_command(base, result, folder)),
                    ("write it for Ai00", export_command(result, result.with_suffix(".st"), "ai00")),
                ]
            ),
            f"           RWKV-Runner takes {result} as it is, in its folder state-models",
            *([f"           {merged_note}"] if merged_note else []),
        ]


def state_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The model's start states, [H, value, key] fp32, detached, by file key."""
    return {name: model.get_parameter(name).detach() for name in model.shape.state_shapes()}


def blended(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of states, computed in fp64 and rounded once.

    What all of them agree in is scaled by the sum of the weights: with weights that add up to 1, a blend of one state
    with itself is that state to the last bit.

    Args:
        states: at least one; all with the same keys and shapes.
        weights: one for each, of any sign.

    Returns:
        In the states' dtype, or where they differ in one that holds all of theirs.
    """
    total = math.fsum(weights)
    dtype = functools.reduce(torch.promote_types, (next(iter(state.values())).dtype for state in states))
    first, others = states[0], list(zip(states[1:], weights[1:], strict=True))
    sums = {}
    for key, tensor in first.items():
        start = tensor.double()
        total_of_key = start * total
        for other, weight in others:
            total_of_key += weight * (other[key].double() - start)
        sums[key] = total_of_key.to(dtype)
    return sums
