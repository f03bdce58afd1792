"""Bat's kernels on a GPU against their definition in fp64, recorded and not."""

import pytest
import torch
from torch import Tensor

from src.ops.block_diagonal import (
    SIZES,
    add_block_products,
    add_block_products_gradients,
    add_block_products_gradients_torch,
    add_block_products_torch,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rows", "channels"), [(1024, 4096), (37, 1024), (3000, 2048)])
@pytest.mark.parametrize("recorded", [False, True])
def test_kernels(rows: int, channels: int, size: int, recorded: bool) -> None:
    x = normal(rows, channels, seed=1).bfloat16()
    blocks = (normal(channels // size, size, size, seed=2) / size**0.5).bfloat16()
    grad, grad_summed = normal(rows, channels, seed=3).bfloat16(), normal(rows, size, seed=4).bfloat16()

    def run() -> tuple[Tensor, ...]:
        grad_x = grad.clone()
        return *add_block_products(x, blocks), add_block_products_gradients(grad_x, grad_summed, blocks), grad_x

    found = run()
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = run()
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(replayed, found, strict=True))
        return
    exact_x = grad.double()
    exact = (
        *add_block_products_torch(x.double(), blocks.double()),
        add_block_products_gradients_torch(exact_x, grad_summed.double(), blocks.double()),
        exact_x,
    )
    for ours, theirs in zip(found, exact, strict=True):
        assert error(ours.double().view(rows, -1, theirs.shape[1]).sum(1), theirs) < 2.5e-3
