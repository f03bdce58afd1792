"""Rounding fp32 to bf16 up or down at random, so that the mean of many roundings is the value itself.

An update of a bf16 weight that is smaller than half a unit in its last place is lost when it is rounded to the nearest;
rounded stochastically, it is taken as often as it should be.

Source: arXiv 2010.06192, section 3.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_CHUNK_VALUES = 1 << 24
"""Values whose noise exists at one time: 64 MiB."""
_DROPPED = 1 << 16


def round_stochastically(target: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Writes values into target, each rounded to the bf16 below or above with the odds of its distance to the other.

    What bf16 has is written as it is; what is not finite, too.

    Args:
        target: bf16, contiguous.
        values: fp32 of the same shape, contiguous.
        generator: on their device; one number is drawn for each value, in order.
    """
    assert target.dtype == torch.bfloat16
    assert values.dtype == torch.float32
    assert target.shape == values.shape
    assert target.is_contiguous()
    pieces = zip(target.view(-1).split(_CHUNK_VALUES), values.reshape(-1).split(_CHUNK_VALUES), strict=True)
    for into, piece in pieces:
        noise = torch.randint(_DROPPED, piece.shape, generator=generator, device=piece.device, dtype=torch.int32)
        # A float's bits count the floats of its sign up from 0: to add to the lower half carries into the upper one.
        rounded = noise.add_(piece.view(torch.int32)).bitwise_and_(-_DROPPED).view(torch.float32)
        into.copy_(torch.where(piece.isfinite(), rounded, piece))


def seed_of(*parts: object) -> int:
    """A generator's seed from what a tensor's noise is to depend on."""
    return zlib.crc32(" ".join(map(str, parts)).encode())
