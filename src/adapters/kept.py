"""How much layers keep between forward and backward, from what a run trains and the model's sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from src.adapters.full import FullTraining
from src.adapters.lisa import Lisa
from src.adapters.method import Method
from src.adapters.parts import value_count
from src.adapters.turns import names_in_layers
from src.model.recompute import Recompute
from src.model.shape import ModelShape, matrices_of


@dataclass(frozen=True)
class _Layer:
    """What of a layer is trained, by names within it.

    Attributes:
        inputs: weights, and matrices whose adapters keep what they are applied to.
        adapter_values: per position, what adapters keep beside that.
        room: per position, values behind inputs that adapters keep.
        casts: weights that autograd casts, and bytes of their casts.
        adapter_casts: bytes of those of adapters.
    """

    inputs: frozenset[str]
    adapter_values: int
    room: int
    casts: frozenset[tuple[str, int]]
    adapter_casts: int


class KeptByLayers:
    """Bytes that layers keep for their backward: most grow with the positions, casts of trained weights do not.

    Adapters keep no casts of their own, nor of what they have cast with them: all of their mixers' weights but matrices
    (`casts.LayerCasts`). Those that draw random numbers are autograd's: they keep casts, and each what dropout has left
    of its input beside what was drawn, a byte a value on a GPU.

    Args:
        method: what is trained.
        shape: of the model.
        fused: whether element-wise operators are kernels.
        itemsize: bytes of an activation.
        dense: whether frozen matrices are dense and whole, so that adapters take room (`AdapterPlan.rooms`).
        dropout: whether there is dropout of the residual stream.
    """

    def __init__(
        self,
        method: Method,
        shape: ModelShape,
        *,
        fused: bool,
        itemsize: int,
        dense: bool = False,
        dropout: bool = False,
    ) -> None:
        self._shape, self._fused, self._itemsize = shape, fused, itemsize
        self._dropped = shape.dropped_values(fused=fused) if dropout else 0
        adapters = method.adapters
        self._random = random = adapters is not None and adapters.draws_random
        sizes = shape.parameter_shapes()
        trained = names_in_layers(sizes, sizes.keys() - set(method.trained_names(shape)))
        if isinstance(method, Lisa):
            # The first layer may have fewer weights than others.
            by_turns = names_in_layers(sizes, shape.idle_names())
            trained = trained[: -method.draw.layers] + by_turns[-method.draw.layers :]
        matrices = [] if adapters is None else adapters.matrices(shape)
        adapted = names_in_layers(sizes, sizes.keys() - set(matrices))
        narrow = method.narrow_names(shape) if isinstance(method, FullTraining) else []
        stored_narrow = names_in_layers(sizes, sizes.keys() - set(narrow))
        own_sizes = {} if adapters is None else adapters.parameter_shapes(shape)
        adapter_casts = value_count(own_sizes) * itemsize // shape.n_layer if random and itemsize != 4 else 0
        rooms = adapters.rooms(shape) if adapters is not None and fused and dense else {}
        width = max(rooms.values(), default=0)
        roomy = names_in_layers(sizes, sizes.keys() - rooms.keys())
        self._layers = []
        for own, of_adapters, already_narrow, with_room in zip(trained, adapted, stored_narrow, roomy, strict=True):
            by_name = adapters is not None and adapters.keeps_inputs and not random
            inputs = {*own, *(of_adapters if by_name else ())}
            adapter_values = 0 if adapters is None else adapters.narrow_values * len(of_adapters)
            if random:
                dropped = sum(in_features for _, in_features in of_adapters.values())
                adapter_values += dropped + (dropped // 2 if fused else dropped)
            # Without kernels, activations of 2 bytes may be fp16.
            cast = [name for name in own if not (fused if name in already_narrow else itemsize == 4)]
            if of_adapters:
                cast = matrices_of({name: own[name] for name in cast})
            casts = frozenset((name, itemsize * math.prod(own[name])) for name in cast)
            self._layers.append(_Layer(frozenset(inputs), adapter_values, width * len(with_room), casts, adapter_casts))

    def by_layer(self, recompute: Recompute, positions: int) -> list[float]:
        """Bytes of each layer in this mode, from the one that keeps most to the one that keeps least."""
        kept = {layer: self._of_layer(layer, recompute, positions) for layer in set(self._layers)}
        return sorted((kept[layer] for layer in self._layers), reverse=True)

    def of_all(self, recompute: Recompute, positions: int) -> float:
        """Bytes of all layers in this mode."""
        return sum(self.by_layer(recompute, positions))

    def _of_layer(self, layer: _Layer, recompute: Recompute, positions: int) -> float:
        of_position = self._shape.kept_bytes(recompute, fused=self._fused, trained=layer.inputs)
        of_position += 0 if recompute is Recompute.ALL else 2 * (layer.room + self._dropped)
        casts = dict(layer.casts)
        once = sum(casts[name] for name in self._shape.kept_casts(recompute, casts, fused=self._fused))
        if recompute is not Recompute.ALL or not self._random:
            of_position += 2 * layer.adapter_values
            once += layer.adapter_casts
        return positions * of_position * self._itemsize / 2 + once
