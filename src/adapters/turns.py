"""Layers of a model that are trained by turns, each in fp32 while it is its turn and frozen, or packed, meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.model.language_model import LanguageModel
from src.model.shape import LAYER_KEY
from src.scratch import Scratch


@dataclass(frozen=True)
class Turn:
    """What happened to one parameter when layers changed.

    Attributes:
        parameter: of a slot; its values are those of `now`.
        before: the key whose values it held; "" is none.
        now: the key whose values it holds; "" is none.
    """

    parameter: nn.Parameter
    before: str
    now: str


class LayerTurns:
    """The weights of layers that are trained by turns, wherever they are.

    A slot is a set of fp32 parameters as large as a layer, so that an optimizer has the same parameters from first to
    last; a layer that enters a slot copies its values there, and the slot's parameters take the place of its weights.
    Before its first turn a layer's values are the file's, afterwards those it was trained to.

    Args:
        model: everything in it that is trained is trained throughout.
        base: the file's weights by key.
        slots: how many layers are trained at a time.
        quant_type: how matrices of waiting layers are packed; None leaves them dense, in the computation dtype.
        scratch: where trained values of waiting layers are.

    Attributes:
        layers: in slot order; empty before the first turn.
    """

    def __init__(
        self, model: LanguageModel, base: Mapping[str, Tensor], slots: int, quant_type: str | None, scratch: Scratch
    ) -> None:
        shape = model.shape
        throughout = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._model = model
        self._base = base
        self._quant_type = quant_type
        self._scratch = scratch
        self._packed = set(shape.matrix_names()) if quant_type else set()
        self._throughout = sorted(throughout)
        self._names = names_in_layers(shape.parameter_shapes(), throughout | shape.idle_names())
        self._kept: dict[int, dict[str, Tensor]] = {}
        self.layers: tuple[int, ...] = ()
        sizes = {name: size for layer in self._names for name, size in layer.items()}
        self._slots = [
            {name: nn.Parameter(torch.empty(size, device=model.device)) for name, size in sizes.items()}
            for _ in range(slots)
        ]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(key that it could have, parameter) of every slot, in the same order whatever layers are in them."""
        for slot in self._slots:
            for name, parameter in slot.items():
                layer = next(number for number, names in enumerate(self._names) if name in names)
                yield _key(layer, name), parameter

    def change(self, layers: tuple[int, ...]) -> list[Turn]:
        """Trains these layers from now on; a layer that goes on must stay in its slot.

        Args:
            layers: by slot.

        Returns:
            The parameters that changed hands.
        """
        assert len(layers) == len(self._slots) == len(set(layers))
        before = self.layers or (None,) * len(layers)
        changing = [slot for slot, (old, new) in enumerate(zip(before, layers, strict=True)) if old != new]
        for slot in changing:
            if (leaving := before[slot]) is not None:
                assert leaving not in layers
                self._leave(slot, leaving)
        turns = []
        for slot in changing:
            self._enter(slot, layers[slot])
            for name, parameter in self._slots[slot].items():
                keys = [
                    "" if layer is None or name not in self._names[layer] else _key(layer, name)
                    for layer in (before[slot], layers[slot])
                ]
                turns.append(Turn(parameter, *keys))
        self.layers = layers
        return turns

    def weights(self) -> Mapping[str, Tensor]:
        """Every weight of the model by key as it has been trained so far, in file order; not to be written to."""
        trained = self.trained()
        return {key: trained.get(key, self._base[key]) for key in self._model.shape.parameter_shapes()}

    def trained(self) -> dict[str, Tensor]:
        """Everything that has been trained, fp32, by key."""
        values = {key: self._model.get_parameter(key).detach() for key in self._throughout}
        for layer, names in enumerate(self._names):
            if layer in self.layers:
                slot = self._slots[self.layers.index(layer)]
                values |= {_key(layer, name): slot[name].detach() for name in names}
            elif layer in self._kept:
                values |= {_key(layer, name): value for name, value in self._kept[layer].items()}
        return values

    def waiting(self) -> set[str]:
        """Keys of what has been trained and waits: their tensors stay as they are, and new ones take their place."""
        return {_key(layer, name) for layer, kept in self._kept.items() if layer not in self.layers for name in kept}

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Takes on what `trained` gave; a layer that is not in it is as in the file."""
        with torch.no_grad():
            for key in self._throughout:
                self._model.get_parameter(key).copy_(values[key])
        for layer, names in enumerate(self._names):
            own = {name: values[_key(layer, name)] for name in names if _key(layer, name) in values}
            assert len(own) in (0, len(names)), f"some of layer {layer}"
            was_trained = self._kept.pop(layer, None) is not None
            if own:
                self._kept[layer] = self._scratch.keep(own)
            if layer in self.layers:
                self._enter(self.layers.index(layer), layer)
            elif own or was_trained:
                self._freeze(layer, self._values_of(layer))

    def _values_of(self, layer: int) -> Mapping[str, Tensor]:
        """By name: of a waiting layer."""
        return self._kept.get(layer) or {name: self._base[_key(layer, name)] for name in self._names[layer]}

    def _leave(self, slot: int, layer: int) -> None:
        values = {name: self._slots[slot][name].detach() for name in self._names[layer]}
        self._kept[layer] = self._scratch.keep(values)
        self._freeze(layer, values)

    def _enter(self, slot: int, layer: int) -> None:
        values = self._values_of(layer)
        for name, parameter in self._slots[slot].items():
            parameter.grad = None
            if name in values:
                with torch.no_grad():
                    parameter.copy_(values[name].to(parameter.device))
                self._model.place(_key(layer, name), parameter)

    def _freeze(self, layer: int, values: Mapping[str, Tensor]) -> None:
        device, dtype = self._model.device, self._model.compute_dtype
        for name, value in values.items():
            key = _key(layer, name)
            if key in self._packed:
                assert self._quant_type is not None
                self._model.pack(key, value.to(device, dtype), self._quant_type)
            else:
                frozen = value.to(device, dtype, copy=True)
                self._model.place(key, nn.Parameter(frozen, requires_grad=False))


def names_in_layers(shapes: Mapping[str, tuple[int, ...]], others: Collection[str]) -> list[dict[str, tuple[int, ...]]]:
    """Of each layer, name within it -> shape of the weights that are trained by turns: all but the others."""
    layers: list[dict[str, tuple[int, ...]]] = []
    for key, size in shapes.items():
        found = LAYER_KEY.match(key)
        if found:
            number = int(found[1])
            while len(layers) <= number:
                layers.append({})
            if key not in others:
                layers[number][LAYER_KEY.sub("", key)] = size
    return layers


def _key(layer: int, name: str) -> str:
    return f"blocks.{layer}.{name}"
