"""How much layers keep between forward and backward, from what a run trains and the model's sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from src.adapters.full import FullTraining
from src.adapters.lisa import Lisa
from src.adapters.method import Method
from src.adapters.turns import names_in_layers
from src.model.recompute import Recompute
from src.model.shape import ModelShape, matrices_of


@dataclass(frozen=True)
class _Layer:
    """What of a layer is trained, by names within it.

    Attributes:
        inputs: weights, and matrices whose adapters keep what they are applied to.
        narrow_values: per position, what adapters keep beside that.
        casts: weights that autograd casts -> bytes of their casts.
    """

    inputs: frozenset[str]
    narrow_values: int
    casts: frozenset[tuple[str, int]]


class KeptByLayers:
    """Bytes that layers keep for their backward: most grow with the positions, casts of trained weights do not.

    Adapters keep no casts of their own, nor of what they have cast with them: all of their mixers' weights but matrices
    (`casts.LayerCasts`).

    Args:
        method: what is trained.
        shape: of the model.
        fused: whether element-wise operators are kernels.
        itemsize: bytes of an activation.
    """

    def __init__(self, method: Method, shape: ModelShape, *, fused: bool, itemsize: int) -> None:
        self._shape, self._fused, self._itemsize = shape, fused, itemsize
        self._adapters = adapters = method.adapters
        sizes = shape.parameter_shapes()
        trained = names_in_layers(sizes, sizes.keys() - set(method.trained_names(shape)))
        if isinstance(method, Lisa):
            by_turns = names_in_layers(sizes, shape.idle_names())
            trained = by_turns[: method.draw.layers] + trained[method.draw.layers :]
        matrices = [] if adapters is None else adapters.matrices(shape)
        adapted = names_in_layers(sizes, sizes.keys() - set(matrices))
        narrow = method.narrow_names(shape) if isinstance(method, FullTraining) else []
        stored_narrow = names_in_layers(sizes, sizes.keys() - set(narrow))
        self._layers = []
        for own, of_adapters, already_narrow in zip(trained, adapted, stored_narrow, strict=True):
            inputs = {*own, *(of_adapters if adapters is not None and adapters.keeps_inputs else ())}
            narrow_values = 0 if adapters is None else adapters.narrow_values * len(of_adapters)
            # Without kernels, activations of 2 bytes may be fp16.
            cast = [name for name in own if not (fused if name in already_narrow else itemsize == 4)]
            if of_adapters:
                cast = matrices_of({name: own[name] for name in cast})
            casts = frozenset((name, itemsize * math.prod(own[name])) for name in cast)
            self._layers.append(_Layer(frozenset(inputs), narrow_values, casts))

    def by_layer(self, recompute: Recompute, positions: int) -> list[float]:
        """Bytes of each layer in this mode, from the one that keeps most to the one that keeps least."""
        kept = {layer: self._of_layer(layer, recompute, positions) for layer in set(self._layers)}
        return sorted((kept[layer] for layer in self._layers), reverse=True)

    def of_all(self, recompute: Recompute, positions: int) -> float:
        """Bytes of all layers in this mode."""
        return sum(self.by_layer(recompute, positions))

    def _of_layer(self, layer: _Layer, recompute: Recompute, positions: int) -> float:
        of_position = self._shape.kept_bytes(recompute, fused=self._fused, trained=layer.inputs)
        if recompute is not Recompute.ALL or not (self._adapters is not None and self._adapters.draws_random):
            of_position += 2 * layer.narrow_values
        casts = dict(layer.casts)
        kept_casts = self._shape.kept_casts(recompute, casts, fused=self._fused)
        return positions * of_position * self._itemsize / 2 + sum(casts[name] for name in kept_casts)
