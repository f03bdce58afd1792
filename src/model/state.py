"""What a layer carries from one token to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LayerState(NamedTuple):
    """Memory of one layer after some tokens; B rows (or S segments of a packed row).

    Attributes:
        att_shift: [B, C], the time mix's last normalised input.
        wkv: [B, H, N, N] fp32 in (value, key) order, the recurrence's matrix.
        ffn_shift: [B, C], the channel mix's last normalised input.
    """

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor

    def rows(self, index: Tensor) -> LayerState:
        """The rows named by `index`, int64 [K]."""
        return LayerState(*(part.index_select(0, index) for part in self))


ModelState = list[LayerState]


def stacked(state: ModelState) -> LayerState:
    """All layers' memories in one, with an axis of layers first: parts [L, B, ...], copied."""
    return LayerState(*(torch.stack(parts) for parts in zip(*state, strict=True)))


def by_layer(stack: LayerState) -> ModelState:
    """The memories of which `stacked` is made, as views."""
    return [LayerState(*parts) for parts in zip(*(part.unbind(0) for part in stack), strict=True)]


def select_rows(state: ModelState, index: Tensor) -> ModelState:
    """The same rows of every layer."""
    return [layer.rows(index.to(layer.wkv.device)) for layer in state]


def last_tokens(z: Tensor, ends: Tensor | None) -> Tensor:
    """The last position of every row or segment: [B, T, C] -> [B or S, C].

    `ends` int64 [S] are the last positions of a packed row's segments (-1: empty, gives zeros).
    """
    if ends is None:
        # On its own: a view would hold all tokens.
        return z[:, -1].clone() if z.shape[1] > 1 else z[:, -1]
    ends = ends.to(z.device)
    return torch.where((ends >= 0)[:, None], z[0].index_select(0, ends.clamp(min=0)), 0)
