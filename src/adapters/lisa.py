"""LISA: a few layers are trained at a time, drawn anew every so many steps; embedding and head throughout.

Source: arXiv 2403.17919, algorithm 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.adapters.full import save_whole, steps_after_whole
from src.adapters.parts import described, value_count, weights_by_part
from src.adapters.plan import AdapterPlan
from src.adapters.tuning import Rates
from src.adapters.turns import LayerTurns, names_in_layers
from src.checkpoint import FILE_VALUE_BYTES
from src.errors import ConfigError
from src.identity import FileIdentity
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape, Shape
from src.scratch import Scratch

FEWEST_RECORDED_STEPS = 20
"""Between two draws: to record one takes as long as several steps."""


@dataclass(frozen=True)
class Draw:
    """Which layers, and when.

    Attributes:
        layers: how many are trained at a time.
        steps: optimizer steps after which others are drawn.
        seed: of the run; every process of it draws the same.
    """

    layers: int
    steps: int
    seed: int

    def after(self, places: tuple[int, ...], period: int, layer_count: int) -> tuple[int, ...]:
        """The layers of a period, numbered from 0, at the places of those of the period before; () before the first.

        Every period's layers are uniform and without repetition; one that is drawn again stays where it is.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {period}".encode()))
        drawn = set(torch.randperm(layer_count, generator=generator)[: self.layers].tolist())
        new = iter(sorted(drawn.difference(places)))
        return tuple(old if old in drawn else next(new) for old in places) or tuple(sorted(drawn))


class Lisa:
    """See `method.Method`; what is trained throughout is in the model from the start, layers take `turns`.

    Steps are recorded again after every draw, since a recording belongs to the layers it was made with.

    Args:
        draw: which layers are trained when.
        parts: of the names of weights that are trained throughout.
        states: whether states are.
        loads_states: whether states come from a file, which the result holds, too.
        packed: whether the matrices of waiting layers are packed.
        packed_head: whether the head is.
        parks_moments: whether an optimizer's moments wait with their layer, or are dropped.
        rates: factors on rates.
    """

    small = False
    in_place = True
    freezes_matrices = True
    adapters: AdapterPlan | None = None

    def __init__(
        self,
        draw: Draw,
        *,
        parts: tuple[str, ...] = (),
        states: bool = False,
        loads_states: bool = False,
        packed: bool = False,
        packed_head: bool = False,
        parks_moments: bool = False,
        rates: Rates,
    ) -> None:
        self.draw = draw
        self.recordable = draw.steps >= FEWEST_RECORDED_STEPS
        self.parks_moments = parks_moments
        self._parts = parts
        self._states, self._loads_states = states, loads_states
        self._packed, self._packed_head = packed, packed_head
        self._rates = rates
        self._turns: LayerTurns | None = None

    def trained_names(self, shape: ModelShape) -> list[str]:
        """What is trained throughout."""
        if self.draw.layers > shape.n_layer:
            raise ConfigError(f"--lisa_r {self.draw.layers} is more than the model's {shape.n_layer} layers: lower it")
        found = self._shapes_of_parts(shape).values()
        return list(dict.fromkeys([*(name for shapes in found for name in shapes), *self._trained_states(shape)]))

    def turns(
        self, model: LanguageModel, base: Mapping[str, Tensor], quant_type: str | None, scratch: Scratch
    ) -> LayerTurns:
        """The layers of a model that was opened with `trained_names`; see `LayerTurns`."""
        self._turns = LayerTurns(model, base, self.draw.layers, quant_type, scratch)
        return self._turns

    def layer_values(self, shape: ModelShape) -> int:
        """Values that are trained besides what is trained throughout, at any time."""
        layers = names_in_layers(shape.parameter_shapes(), {*self.trained_names(shape), *shape.idle_names()})
        return self.draw.layers * max(map(value_count, layers))

    def rate_factor(self, shape: ModelShape, name: str) -> float:
        """See Method."""
        if name in shape.state_shapes():
            return self._rates.states
        return shape.rate_factor(name) if self._rates.layerwise else 1.0

    def describe(self, shape: ModelShape) -> str:
        """See Method."""
        layers = self.draw.layers
        groups = [f"states: {shape.state_parameter_count:,}"] if self._states else []
        groups += described(self._shapes_of_parts(shape))
        always = f"{', '.join(groups)} values throughout" if groups else "nothing else"
        moments = "wait on the host" if self.parks_moments else "are dropped"
        waiting = shape.n_layer - layers
        host_gib = waiting * self.layer_values(shape) / layers * 4 / 2**30
        return (
            f"LISA: {layers} of {shape.n_layer} layers at a time ({self.layer_values(shape):,} values), drawn every "
            f"{'step' if self.draw.steps == 1 else f'{self.draw.steps:,} steps'}, and {always}\n"
            f"           a layer that leaves: its moments {moments}, its weights wait in fp32 in a scratch file "
            f"({host_gib:.2f} GiB for {waiting})"
        )

    def file_bytes(self, shape: ModelShape) -> int:
        """See Method."""
        return shape.parameter_count * FILE_VALUE_BYTES

    def properties(self, shape: ModelShape) -> dict[str, Any]:
        """See Method."""
        return {
            "method": "lisa",
            "lisa_r": self.draw.layers,
            "lisa_k": self.draw.steps,
            "train_parts": list(self._parts),
            "states": self._states,
        }

    def check_files(self, shape: ModelShape, base: FileIdentity | None) -> None:
        """See Method."""

    def start(self, shape: ModelShape, folder: Path, base: FileIdentity | None) -> Mapping[str, Tensor]:
        """See Method."""
        return {}

    def begin(self, model: LanguageModel, folder: Path, base: FileIdentity | None, start: Mapping[str, Tensor]) -> None:
        """See Method."""

    def save(self, model: LanguageModel, path: Path) -> None:
        """Writes the whole model in bf16: layers as they were trained, or as they are in the file."""
        assert self._turns is not None
        save_whole(model, self._turns.weights(), path)

    def next_steps(self, base: str, result: Path, folder: str, template: str | None, merged_note: str) -> list[str]:
        """See Method."""
        return steps_after_whole(result, folder, template, merged_note if self._states or self._loads_states else "")

    def _trained_states(self, shape: ModelShape) -> list[str]:
        return list(shape.state_shapes()) if self._states else []

    def _shapes_of_parts(self, shape: ModelShape) -> dict[str, dict[str, Shape]]:
        packed = set(shape.matrix_names()) if self._packed else set()
        packed |= {"head.weight"} if self._packed_head else set()
        return weights_by_part(self._parts, shape, packed=packed, way_out="or leave it out")
