"""Bat's products: the definition against a loop over blocks in fp64, and the kernels, on the emulator, against it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from emulator.kernels import emulated, has_compiler
from operators import poisoned_memory
from torch import Tensor

from src.ops import block_diagonal
from src.ops.block_diagonal import (
    SIZES,
    add_block_products,
    add_block_products_gradients,
    add_block_products_gradients_torch,
    add_block_products_torch,
    by_block,
    kernels_for,
)

BOUND = 2.5e-3
"""Of bf16's roundings; at most 2.4e-3 was measured."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("rows", "count", "size"), [(5, 3, 8), (1, 1, 16), (0, 2, 4)])
def test_definition_is_a_loop_over_blocks(rows: int, count: int, size: int) -> None:
    x, blocks = normal(rows, count * size, seed=1).requires_grad_(), normal(count, size, size, seed=2).requires_grad_()
    parts = [part @ block.t() for part, block in zip(x.split(size, dim=1), blocks, strict=True)]
    expected = x + torch.cat(parts, dim=1), sum(parts, torch.zeros(rows, size, dtype=torch.float64))
    found = add_block_products(x.detach(), blocks.detach())
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact.detach())

    grad_moved, grad_summed = normal(rows, count * size, seed=3), normal(rows, size, seed=4)
    torch.autograd.backward(expected, (grad_moved.clone(), grad_summed))
    added = add_block_products_gradients(grad_moved, grad_summed, blocks.detach())
    torch.testing.assert_close(grad_moved, x.grad)
    torch.testing.assert_close(by_block(added, blocks).transpose(1, 2) @ by_block(x.detach(), blocks), blocks.grad)


def test_sizes_without_a_kernel_need_none_compiled() -> None:
    assert kernels_for(48) == ()
    assert [len(kernels_for(size)) for size in SIZES] == [2, 2, 2]


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(block_diagonal, "_have_kernels", lambda size: True)
    for name in ("add_block_products_torch", "add_block_products_gradients_torch"):
        monkeypatch.setattr(block_diagonal, name, None)
    with poisoned_memory(), emulated():
        yield


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rows", "count"), [(1, 3), (40, 20), (16 * 132 + 1, 1), (0, 2)])
def test_kernels(rows: int, count: int, size: int) -> None:
    """Of whole and cut row tiles, more and fewer blocks than warps, and so many rows that no block has parts."""
    x = normal(rows, count * size, seed=1).bfloat16()
    blocks = (normal(count, size, size, seed=2) / size**0.5).bfloat16()
    grad, grad_summed = normal(rows, count * size, seed=3).bfloat16(), normal(rows, size, seed=4).bfloat16()

    def check(run: Callable[[], tuple[Tensor, ...]], exact: tuple[Tensor, ...]) -> None:
        found, again = run(), run()
        for ours, second, theirs in zip(found, again, exact, strict=True):
            assert torch.equal(ours, second)
            assert ours.dtype is torch.bfloat16
            if rows:
                assert error(ours.double().view(rows, -1, theirs.shape[1]).sum(1), theirs) < BOUND

    def forward() -> tuple[Tensor, ...]:
        moved, summed = add_block_products(x, blocks)
        assert summed.shape[1] == (2 if rows <= 16 * 132 else 1) * size
        return moved, summed

    def backward() -> tuple[Tensor, ...]:
        grad_x = grad.clone()
        return add_block_products_gradients(grad_x, grad_summed, blocks), grad_x

    check(forward, add_block_products_torch(x.double(), blocks.double()))
    exact_x = grad.double()
    exact_added = add_block_products_gradients_torch(exact_x, grad_summed.double(), blocks.double())
    check(backward, (exact_added, exact_x))
