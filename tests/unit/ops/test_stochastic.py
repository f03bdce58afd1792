"""Stochastic rounding: to a neighbour, right in the mean, and nothing lost of updates too small for bf16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from src.ops import stochastic
from src.ops.stochastic import round_stochastically, seed_of


def rounded(values: Tensor, seed: int = 0) -> Tensor:
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically(target, values, torch.Generator().manual_seed(seed))
    return target


def around(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers next to values, towards 0 and away from it."""
    inner = (values.view(torch.int32) & -65536).view(torch.float32)
    outer = torch.where(inner == values, inner, ((values.view(torch.int32) & -65536) + 65536).view(torch.float32))
    return inner, outer


def test_what_bf16_has_stays() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.cat([torch.randn(5000, generator=generator).bfloat16().float(), torch.tensor([0.0, -0.0, 1e-40])])
    values[-1] = torch.tensor(2.0**-130)
    assert torch.equal(rounded(values).float(), values)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_each_goes_to_a_neighbour_and_their_mean_is_right(scale: float) -> None:
    """20,000 roundings of each of 64 values: the mean's standard error is half a gap over √20,000, at most."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(2)) * scale
    inner, outer = around(values)
    made = rounded(values.repeat(20_000, 1)).double()
    assert bool(((made == inner.double()) | (made == outer.double())).all())
    share = (values.double() - inner) / (outer.double() - inner)
    error = (outer.double() - inner).abs() * (share * (1 - share)).sqrt() / math.sqrt(20_000)
    assert bool(((made.mean(0) - values).abs() <= 4.5 * error).all())


def test_updates_below_half_a_unit_in_the_last_place_accumulate() -> None:
    """1,000 additions of 2⁻¹¹ to 1, where bf16 has steps of 2⁻⁷: to the nearest nothing moves."""
    weights, nearest = torch.ones(4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    generator, update = torch.Generator().manual_seed(3), 2.0**-11
    for _ in range(1000):
        round_stochastically(weights, weights.float() + update, generator)
        nearest += update
    assert bool((nearest == 1).all())
    moved = weights.double() - 1
    error = float(moved.std() / math.sqrt(4096))
    assert abs(float(moved.mean()) - 1000 * update) < 4 * error
    assert error < 0.01 * 1000 * update


def test_what_is_not_finite_stays_so() -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan, torch.finfo(torch.float32).max]).repeat(1000)
    made = rounded(values).float().view(1000, 4)
    assert bool((made[:, 0] == math.inf).all())
    assert bool((made[:, 1] == -math.inf).all())
    assert bool(made[:, 2].isnan().all())
    assert bool((made[:, 3] > 3e38).all())


def test_it_is_a_function_of_the_generator_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 33, generator=torch.Generator().manual_seed(4))
    whole = rounded(values, 5)
    assert torch.equal(rounded(values, 5), whole)
    assert not torch.equal(rounded(values, 6), whole)
    monkeypatch.setattr(stochastic, "_CHUNK_VALUES", 64)
    pieces = rounded(values, 5).float()
    inner, outer = around(values)
    assert bool(((pieces == inner) | (pieces == outer)).all())


def test_seeds_tell_tensors_and_steps_apart() -> None:
    seeds = {seed_of(42, step, name) for step in range(100) for name in ("emb.weight", "head.weight")}
    assert len(seeds) == 200
