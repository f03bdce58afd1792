"""Gradients of the rows that were read, against the dense ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.ops.adam import Constants, Control, Moments, adam_step
from src.ops.row_gradient import RowGradient, values_of

ROWS, COLUMNS = 50, 12
CONSTANTS = Constants(0.9, 0.99, 1e-8, clip=1.0)


def gradients(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(sparse, dense) of a table that is read at so many places, some rows several times."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(ROWS // 2, (count,), generator=generator)
    upper = torch.randn(count, COLUMNS, generator=generator).to(dtype)
    found = []
    for sparse in (True, False):
        table = torch.zeros(ROWS, COLUMNS, dtype=dtype, requires_grad=True)
        F.embedding(places, table, sparse=sparse).backward(upper)
        assert table.grad is not None
        assert table.grad.is_sparse == sparse
        found.append(table.grad)
    return found[0], found[1]


@pytest.mark.parametrize("count", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_dense_ones_bit_for_bit(dtype: torch.dtype, count: int) -> None:
    sparse, dense = gradients(count, dtype)
    rows = RowGradient.of(sparse)
    assert rows.values.shape == (count, COLUMNS)
    assert rows.values.dtype == dtype
    assert torch.equal(rows.dense(), dense)
    read = rows.places >= 0
    assert torch.equal(read, dense.ne(0).any(1))
    # The norm is formed of the values: none may stand there twice.
    assert float(values_of(rows).float().norm()) == pytest.approx(float(dense.float().norm()), rel=1e-6)
    assert values_of(dense) is dense


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_were_not_read_are_updated_as_adam_has_it(dtype: torch.dtype, packed: bool) -> None:
    """Their moments decay, they move by what is left of these, and by the decay of weights."""
    start = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)).to(dtype)
    tables = [start.clone() for _ in range(2)]
    moments = [Moments.zeros(start, packed=packed) for _ in range(2)]
    for step in range(4):
        given = Control(
            torch.tensor([CONSTANTS.settings_row(1e-2, 0.1, step + 1)]),
            torch.tensor(2.0),
            torch.tensor([step, 0], dtype=torch.int32),
        )
        sparse, dense = gradients(20, dtype, seed=step)
        before = tables[0].clone()
        for gradient, table, own in zip((RowGradient.of(sparse), dense), tables, moments, strict=True):
            adam_step(table, gradient, own, given, CONSTANTS, 0, 7)
        if step:
            unread = ~dense.ne(0).any(1)
            assert bool((tables[0] != before)[unread].any())
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(moments[0].first, moments[1].first)
    assert torch.equal(moments[0].second, moments[1].second)
