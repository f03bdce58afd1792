"""Products of several pairs on a GPU: odd ranks, one operand for all pairs, sums in fp32, recorded and not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from src.ops.products import outer_sums, products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
COUNT = 4


def in_one_piece(rows: int, columns: int, seed: int) -> list[Tensor]:
    values = torch.randn(COUNT, rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return list(values.to(DEVICE).unbind())


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    one, other = (torch.stack(each).double() for each in (found, exact))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("one_for_all", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 8, 16, 64, 128])
@pytest.mark.parametrize("rows", [1, 37, 1024])
def test_they_are_those_of_each_pair(rows: int, rank: int, one_for_all: bool, scale: float) -> None:
    inputs = in_one_piece(rows, 128, 1)
    downs = [down.t() for down in in_one_piece(rank, 128, 2)]
    ups = [up.t() for up in in_one_piece(96, rank, 3)]
    if one_for_all:
        downs, ups = [downs[0]] * COUNT, [ups[0]] * COUNT

    def run() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        hidden = products(inputs, downs, scale)
        return hidden, products(hidden, ups), outer_sums(hidden, inputs)

    hidden, added, outer = run()
    exact_hidden = [scale * x.double() @ down.double() for x, down in zip(inputs, downs, strict=True)]
    exact_added = [own.double() @ up.double() for own, up in zip(hidden, ups, strict=True)]
    exact_outer = [own.double().t() @ x.double() for own, x in zip(hidden, inputs, strict=True)]
    assert {gradient.dtype for gradient in outer} == {torch.float32}
    assert error(hidden, exact_hidden) < 3e-3
    assert error(added, exact_added) < 3e-3
    assert error(outer, exact_outer) < 1e-5

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    graph.replay()
    for again, before in zip(recorded, (hidden, added, outer), strict=True):
        assert error(again, before) < 3e-3
