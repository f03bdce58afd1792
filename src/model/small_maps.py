"""Where the frozen small maps of an RWKV-7 layer lie, so that several of them are computed at once.

Legend: C channels, W hidden values that each map is given, D those it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from src.ops.rows import VECTOR
from src.ops.small_maps import Maps


def hidden_width(widths: Mapping[str, int]) -> int:
    """W: room for the widest map and for the 1 that multiplies biases."""
    return -(-(max(widths.values()) + 1) // VECTOR) * VECTOR


class SmallMaps:
    """The room of one layer's maps: their parameters are views of it, with the shapes they have in files.

    A map's first matrix is then strided. One that is trained has memory of its own, and its room waits.

    Args:
        channels: C, of input and result.
        widths: D of each map by its letter, in the order in which they are computed; its bias and its two matrices are
            called by that letter and 0, 1 and 2.
        gate: names of the gate's two matrices, which lie by themselves.
    """

    def __init__(self, channels: int, widths: Mapping[str, int], gate: tuple[str, str]) -> None:
        self._channels = channels
        self._gate = gate
        self._widths = dict(widths)
        self._placed: dict[str, Tensor] = {}
        self._maps: Maps | None = None
        self._room: tuple[Tensor, Tensor] | None = None

    def placed(self, name: str, weight: nn.Parameter) -> nn.Parameter:
        """The parameter to register by this name: where it is one of these maps' and frozen, one that lies in the room.

        Args:
            name: without the layer.
            weight: with its values.
        """
        self._maps = None
        self._placed.pop(name, None)
        if weight.requires_grad or weight.is_meta or not (weight.is_cuda and weight.dtype is torch.bfloat16):
            return weight
        if name[:1] in self._widths and name[1:] in ("0", "1", "2"):
            with torch.no_grad():
                weight = nn.Parameter(self._view(name, weight).copy_(weight), requires_grad=False)
        elif name not in self._gate:
            return weight
        self._placed[name] = weight
        return weight

    def ready(self, parameters: Mapping[str, Any]) -> Maps | None:
        """The maps, if all of these parameters lie here and none is trained."""
        if len(self._placed) < len(self._gate) + 3 * len(self._widths):
            return None
        for name, placed in self._placed.items():
            if parameters[name] is not placed or placed.requires_grad:
                return None
        if self._maps is None:
            assert self._room is not None
            self._maps = Maps(*self._room, *(self._placed[name].detach() for name in self._gate))
        return self._maps

    def _view(self, name: str, like: Tensor) -> Tensor:
        """Where the parameter lies."""
        if self._room is None or self._room[0].device != like.device:
            self._placed.clear()
            count, width = len(self._widths), hidden_width(self._widths)
            self._room = (
                like.new_zeros(count, self._channels, width),
                like.new_zeros(count, width, self._channels),
            )
        first, second = self._room
        number, width = list(self._widths).index(name[0]), self._widths[name[0]]
        if name[1] == "0":
            return second[number, -1].view(1, 1, -1)
        return first[number, :, :width] if name[1] == "1" else second[number, :width]
