"""`cuda/adam.cu` on the emulator: what a GPU would compute, where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from emulator.kernels import emulated, has_compiler

from src.ops import adam
from src.ops.adam import Constants, Control, Moments, adam_step_torch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs g++")]

CONSTANTS = Constants(0.9, 0.99, 1e-8, clip=1.0)
SEED = 12345


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("count", [256, 4900, 3001])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_definition(
    dtype: torch.dtype, packed: bool, count: int, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam, "_multiprocessors", lambda index: 1)
    generator = torch.Generator().manual_seed(count)
    start = torch.randn(count, generator=generator).to(dtype)
    scale = torch.rand(count, generator=generator) ** 3
    one, other = torch.cat([start[:1], start])[1:] if not aligned else start.clone(), start.clone()
    moments = [Moments.zeros(start, packed=packed) for _ in range(2)]
    for number in range(6):
        gradient = (scale * (torch.randn(count, generator=generator) + 0.2)).to(dtype)
        rows = torch.tensor([[0.0] * 4, CONSTANTS.settings_row(1e-2, 0.1, number + 1)])
        norm = torch.tensor((math.nan, 0.5, 2.0)[number % 3])
        given = Control(rows, norm, torch.tensor([number, int(number == 4)], dtype=torch.int32))
        with emulated():
            adam._by_kernel(one, gradient, moments[0], given, CONSTANTS, 1, SEED)
        adam_step_torch(other, gradient, moments[1], given, CONSTANTS, 1, SEED)
    differ = (one != other).float().mean()
    if dtype == torch.bfloat16:  # where sums in another order end on the other side of a border
        assert float(differ) < 0.005
        assert packed or not differ
    assert float((one.float() - other.float()).abs().max()) < (1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert not torch.equal(one, start)
