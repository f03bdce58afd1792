"""One tensor's Adam step against torch's optimizer, its rounding, its 8-bit moments, and what stops it."""

from __future__ import annotations

import math

import pytest
import torch
from adam_of_bitsandbytes import step_is_bitsandbytes
from torch import Tensor, nn

from src.ops.adam import Constants, Control, Moments, adam_step, dynamic_map, rounded_by_hash

CONSTANTS = Constants(0.9, 0.99, 1e-8, clip=1.0)


def control(step: int, *, norm: float = 0.5, stopped: int = 0, rate: float = 1e-2, decay: float = 0.1) -> Control:
    rows = [[0.0] * 4, CONSTANTS.settings_row(rate, decay, step + 1)]
    return Control(torch.tensor(rows), torch.tensor(norm), torch.tensor([step, stopped], dtype=torch.int32))


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def apart(one: Tensor, other: Tensor, start: Tensor) -> float:
    return float((one - other).norm() / (other - start).norm())


@pytest.mark.parametrize("norm", [0.5, 2.0, math.nan])
def test_fp32_is_torchs_step_on_the_clipped_gradient(norm: float) -> None:
    start = drawn(70, 70)
    weights, same = start.clone(), nn.Parameter(start.clone())
    moments = Moments.zeros(weights, packed=False)
    optimizer = torch.optim.AdamW([same], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        gradient = drawn(70, 70, seed=step + 1)
        same.grad = gradient / (2 + 1e-6) if norm == 2 else gradient.clone()
        optimizer.step()
        adam_step(weights, gradient, moments, control(step, norm=norm), CONSTANTS, 1, 3)
    assert apart(weights, same.detach(), start) < 1e-5


@pytest.mark.parametrize("spread", [1, 4])
def test_moments_in_8_bits_follow_those_in_fp32(spread: int) -> None:
    """Also where gradients of a block differ by orders of magnitude, whose squares 8 bits cannot tell from 0."""
    start, scale = drawn(70, 70), drawn(70, 70, seed=9).abs().clamp(max=1) ** spread
    weights, wide = start.clone(), start.clone()
    moments = [Moments.zeros(start, packed=packed) for packed in (True, False)]
    for step in range(40):
        gradient = scale * (drawn(70, 70, seed=step + 1) + 0.2)
        adam_step(weights, gradient, moments[0], control(step), CONSTANTS, 1, 3)
        adam_step(wide, gradient, moments[1], control(step), CONSTANTS, 1, 3)
    assert apart(weights, wide, start) < (0.1 if spread == 1 else 0.35)
    assert moments[0].first.dtype == moments[0].second.dtype == torch.uint8
    assert moments[0].first_scales is not None
    assert moments[0].first_scales.shape == (20,)


def test_the_maps_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        torch.testing.assert_close(dynamic_map(signed=signed), functional.create_dynamic_map(signed), rtol=0, atol=1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("spread", [1, 4])
def test_in_8_bits_it_is_bitsandbytes_step(spread: int, weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun at each step from what the library has left: the same bytes, and weights but for rounding."""
    pytest.importorskip("bitsandbytes")
    step_is_bitsandbytes(adam_step, CONSTANTS, monkeypatch, spread=spread, weight_decay=weight_decay)


@pytest.mark.parametrize("packed", [False, True])
def test_cleared_moments_are_those_before_the_first_step(packed: bool) -> None:
    weights = drawn(70, 70)
    moments, fresh = (Moments.zeros(weights, packed=packed) for _ in range(2))
    adam_step(weights, drawn(70, 70, seed=1), moments, control(0), CONSTANTS, 1, 3)
    kept = [tensor for tensor in vars(moments).values() if tensor is not None]
    before = [tensor for tensor in vars(fresh).values() if tensor is not None]
    assert not any(torch.equal(*pair) for pair in zip(kept, before, strict=True))
    moments.clear()
    assert all(torch.equal(*pair) for pair in zip(kept, before, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flag_leaves_everything_as_it_is(dtype: torch.dtype, packed: bool) -> None:
    weights = drawn(20, 256).to(dtype)
    moments = Moments.zeros(weights, packed=packed)
    adam_step(weights, drawn(20, 256, seed=1).to(dtype), moments, control(0), CONSTANTS, 1, 3)
    tensors = [weights, *(value for value in vars(moments).values() if value is not None)]
    before = [tensor.clone() for tensor in tensors]
    spoilt = torch.full((20, 256), math.nan, dtype=dtype)
    adam_step(weights, spoilt, moments, control(1, stopped=2), CONSTANTS, 1, 3)
    assert all(torch.equal(*pair) for pair in zip(before, tensors, strict=True))
    assert not torch.equal(weights.float(), drawn(20, 256))


def test_bf16_is_the_fp32_step_rounded_to_a_neighbour() -> None:
    weights = drawn(33, 31).bfloat16()
    wide, gradient = weights.float(), drawn(33, 31, seed=1).bfloat16()
    adam_step(weights, gradient, Moments.zeros(weights, packed=False), control(0), CONSTANTS, 1, 3)
    adam_step(wide, gradient.float(), Moments.zeros(wide, packed=False), control(0), CONSTANTS, 1, 3)
    assert bool(((weights.float() - wide).abs() <= wide.abs() * 2**-7).all())
    assert not torch.equal(weights, wide.bfloat16()), "some go to the farther one"


class TestRounding:
    def test_the_mean_is_right_over_places_and_over_steps(self) -> None:
        values = drawn(64, seed=2)
        over_places = rounded_by_hash(values.repeat(20_000, 1), 7, torch.tensor(3)).double().mean(0)
        over_steps = torch.stack([rounded_by_hash(values, 7, torch.tensor(step)) for step in range(2_000)])
        for mean, count in ((over_places, 20_000), (over_steps.double().mean(0), 2_000)):
            error = values.abs() * 2**-8 / math.sqrt(count)  # half a gap, at most
            assert bool(((mean - values).abs() <= 4.5 * error).all())

    def test_noise_depends_on_seed_and_step_and_place(self) -> None:
        values = torch.full((4096,), 1 + 2**-9)
        one = rounded_by_hash(values, 1, torch.tensor(0))
        assert torch.equal(one, rounded_by_hash(values, 1, torch.tensor(0)))
        for other in (rounded_by_hash(values, 2, torch.tensor(0)), rounded_by_hash(values, 1, torch.tensor(1))):
            agree = float((one == other).float().mean())
            assert agree == pytest.approx(0.25**2 + 0.75**2, abs=0.05)
        shifted = float((one[1:] == one[:-1]).float().mean())
        assert shifted == pytest.approx(0.25**2 + 0.75**2, abs=0.05)

    def test_what_bf16_has_and_what_is_not_finite_stays(self) -> None:
        values = torch.cat([drawn(1000).bfloat16().float(), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
        made = rounded_by_hash(values, 1, torch.tensor(0))
        assert torch.equal(made[:-1], values[:-1])
        assert bool(made[-1].isnan())
