"""`cuda/adam.cu` on the emulator: what a GPU would compute, where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from adam_of_bitsandbytes import step_is_bitsandbytes
from emulator.kernels import emulated, has_compiler
from torch import Tensor

from src.ops import adam
from src.ops.adam import Constants, Control, Moments, adam_step_torch
from src.ops.row_gradient import RowGradient

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


@pytest.mark.parametrize("spread", [1, 4])
def test_in_8_bits_it_is_bitsandbytes_step(spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(adam._OfOneKind, "by_kernels", True)

    def step(
        weights: Tensor, gradient: Tensor, moments: Moments, control: Control, constants: Constants, row: int, seed: int
    ) -> None:
        many = adam.ManySteps([weights], [moments], [row], [seed])
        with emulated():
            many.look_at([gradient])
            many.step(control, constants)

    step_is_bitsandbytes(step, CONSTANTS, monkeypatch, spread=spread, weight_decay=0.1)


def test_many_tensors_at_once_are_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both dtypes, with either kind of moments, longer than a piece, odd, empty, and one without a gradient at
    times; and with other rows of settings from some step on.
    """
    monkeypatch.setattr(adam._OfOneKind, "by_kernels", True)
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(count, generator=generator).to(dtype)

    kinds = [(dtype, packed) for dtype in (torch.float32, torch.bfloat16) for packed in (False, True)]
    cases = [(count, *kind) for kind in kinds for count in (9000, 256, 77, 0)]
    weights = [drawn(count, dtype) for count, dtype, _ in cases]
    others = [tensor.clone() for tensor in weights]
    moments, of_others = (
        [Moments.zeros(tensor, packed=packed) for tensor, (_, _, packed) in zip(weights, cases, strict=True)]
        for _ in range(2)
    )
    rows = torch.tensor([CONSTANTS.settings_row(rate, 0.1, 1) for rate in (1e-2, 1e-3, 3e-3)])
    chosen, seeds = [number % 2 for number in range(len(cases))], list(range(100, 100 + len(cases)))
    many = adam.ManySteps(weights, moments, chosen, seeds)
    for number in range(4):
        if number == 2:
            chosen = [2 - row for row in chosen]
            many.use_rows(chosen)
        gradients: list[Tensor | None] = [drawn(count, dtype) for count, dtype, _ in cases]
        if number != 2:
            gradients[1] = None
        flags = torch.tensor([number, int(number == 1)], dtype=torch.int32)
        with emulated():
            many.look_at(gradients)
            norm = many.gradient_norm()
            many.step(Control(rows, norm, flags), CONSTANTS)
        given = [gradient for gradient in gradients if gradient is not None]
        expected = torch.linalg.vector_norm(torch.cat([gradient.float() for gradient in given]))
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                one = (others[place], gradient, of_others[place], Control(rows, norm, flags), CONSTANTS)
                adam_step_torch(*one, chosen[place], seeds[place])
    for one, other, (_, dtype, _) in zip(weights, others, cases, strict=True):
        differ = (one.float() - other.float()).abs()
        gap = 2**-7 * other.float().abs() if dtype == torch.bfloat16 else 0.0  # to a neighbour
        assert bool((differ <= gap + (1e-3 if dtype == torch.bfloat16 else 1e-4)).all())
        assert float((one != other).float().mean() if dtype == torch.bfloat16 and one.numel() > 256 else 0) < 0.005


@pytest.mark.parametrize("columns", [16, 20])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_some_rows_is_the_dense_one(
    dtype: torch.dtype, packed: bool, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; also where a lane's eight values are of two rows."""
    monkeypatch.setattr(adam, "_multiprocessors", lambda index: 1)
    generator = torch.Generator().manual_seed(columns)
    start = torch.randn(37, columns, generator=generator).to(dtype)
    tables = [start.clone() for _ in range(2)]
    moments = [Moments.zeros(start, packed=packed) for _ in range(2)]
    for number in range(2):
        places = torch.randint(37, (11,), generator=generator)
        values = torch.randn(11, columns, generator=generator).to(dtype)
        rows = RowGradient.of(torch.sparse_coo_tensor(places[None], values, start.shape, check_invariants=False))
        settings = torch.tensor([CONSTANTS.settings_row(1e-2, 0.1, number + 1)])
        given = Control(settings, torch.tensor(0.5), torch.tensor([number, 0], dtype=torch.int32))
        with emulated():
            for table, own, gradient in zip(tables, moments, (rows, rows.dense()), strict=True):
                adam._by_kernel(table, gradient, own, given, CONSTANTS, 0, SEED)
    assert not torch.equal(tables[0], start)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(moments[0].first, moments[1].first)
    assert torch.equal(moments[0].second, moments[1].second)
