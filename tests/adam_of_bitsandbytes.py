"""8-bit steps beside bitsandbytes' own on a CPU: what its definition and its kernel have to agree with."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.ops.adam import BLOCK_VALUES, Constants, Control, Moments, dynamic_map

_PLACES_OF_ZERO = {"state1": 127, "state2": 0}


def round_to_nearest(patch: pytest.MonkeyPatch) -> None:
    """Has the library round moments to the nearest of its numbers on a CPU, too.

    Its quick quantiser of fp32 there does so on a grid of 2^16 places, which misses by up to 3e-5 of a scale; the one
    it has for all other types takes its place.
    """
    from bitsandbytes.backends.cpu import ops

    patch.setattr(ops, "_quant_blockwise_fp32_direct", _quantise)


def step_is_bitsandbytes(
    step: Callable[..., None],
    constants: Constants,
    patch: pytest.MonkeyPatch,
    *,
    spread: int,
    weight_decay: float,
    steps: int = 8,
) -> None:
    """Asserts that each of some steps, begun from what the library has left, leaves what the library's does.

    Bytes are equal but for ties, which sums in another order end on either side of, and one rule: a mean of squares
    that the library rounds to 0 is the smallest number here (`src.ops.adam`).

    Args:
        step: `adam_step`, or what stands for it.
        constants: of both.
        patch: for the library's quantiser.
        spread: 4 has gradients of a block that differ by orders of magnitude, whose squares 8 bits cannot tell from 0.
        weight_decay: of both.
        steps: that are taken.
    """
    from bitsandbytes.optim import AdamW8bit

    generator = torch.Generator().manual_seed(spread)
    start = torch.randn(70, 71, generator=generator)
    scale = torch.rand(70, 71, generator=generator) ** spread
    theirs = torch.nn.Parameter(start.clone())
    betas = (constants.beta1, constants.beta2)
    round_to_nearest(patch)
    library = AdamW8bit([theirs], lr=1e-2, betas=betas, eps=constants.eps, weight_decay=weight_decay)
    moments = Moments.zeros(start, packed=True)
    for number in range(steps):
        own = theirs.detach().clone()
        if number:
            _take_over(moments, library.state[theirs])
        theirs.grad = scale * (torch.randn(70, 71, generator=generator) + 0.2)
        rows = torch.tensor([constants.settings_row(1e-2, weight_decay, number + 1)])
        given = Control(rows, torch.tensor(math.nan), torch.tensor([number, 0], dtype=torch.int32))
        step(own, theirs.grad.clone(), moments, given, constants, 0, 1)
        before = theirs.detach().clone()
        library.step()
        left = library.state[theirs]
        rounded_to_zero = _assert_same_bytes(moments, left)
        moved = (theirs.detach() - before).abs()
        assert bool(((own - theirs.detach()).abs() <= 1e-6 * before.abs() + 3e-6 * moved + 1e-9).all())
    assert rounded_to_zero, "or the rule was not tried"


def _quantise(values: Tensor, numbers: Tensor, scales: Tensor, places: Tensor, block_values: int) -> None:
    made, scale = torch.ops.bitsandbytes.quantize_blockwise(values.double(), numbers.double(), block_values)
    places.copy_(made)
    scales.copy_(scale)


def _take_over(moments: Moments, left: dict[str, Tensor]) -> None:
    assert moments.first_scales is not None
    assert moments.second_scales is not None
    pairs = {
        "state1": moments.first, "state2": moments.second,
        "absmax1": moments.first_scales, "absmax2": moments.second_scales,
    }  # fmt: skip
    for name, own in pairs.items():
        assert own.shape == left[name].shape
        assert own.dtype == left[name].dtype
        own.copy_(left[name])


def _assert_same_bytes(moments: Moments, left: dict[str, Tensor]) -> int:
    """Gives the number of means of squares that the library has rounded to 0."""
    rounded_to_zero = 0
    for name, own, scales, signed in (
        ("state1", moments.first, moments.first_scales, True),
        ("state2", moments.second, moments.second_scales, False),
    ):
        theirs = left[name].int()
        if not signed:
            rounded_to_zero = int((theirs == 0).sum())
            theirs = theirs.clamp(min=1)
        apart = (own.int() - theirs).abs()
        assert int(apart.max()) <= 1
        assert float((apart > 0).float().mean()) < 1e-3
        assert scales is not None
        assert torch.allclose(scales, left[f"absmax{2 - signed}"], rtol=1e-6)
        numbers = dynamic_map(signed=signed)
        assert int(numbers.abs().argmin()) == _PLACES_OF_ZERO[name]
        assert len(scales) == math.ceil(own.numel() / BLOCK_VALUES)
    return rounded_to_zero
