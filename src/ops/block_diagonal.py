"""A product with a block-diagonal matrix, added to its input and summed over the blocks: Bat's share beside a matrix.

On a GPU in bf16, with blocks of a size in SIZES, it is one kernel each way (`cuda/block_diagonal.cu`); the definition
is in plain torch. Outside autograd; sums are in fp32.

Legend: n rows, C channels, r size of a block.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from src.ops.kernels import Kernel, usable

SIZES = (32, 64, 128)
"""Of blocks, that the kernels take."""
_ROWS = 16
_WARPS = {32: 16, 64: 8, 128: 8}
_WANTED = 132
"""Blocks of threads that fill a GPU."""
_FORWARD, _BACKWARD = (
    {
        size: Kernel("block_diagonal.cu", f"block_diagonal::{name}_kernel<{size}, {_WARPS[size]}>", "PPPPii")
        for size in SIZES
    }
    for name in ("forward", "backward")
)
KERNELS = (*_FORWARD.values(), *_BACKWARD.values())


def kernels_for(size: int) -> tuple[Kernel, ...]:
    """The kernels that blocks of this size need; none if they have none."""
    return (_FORWARD[size], _BACKWARD[size]) if size in SIZES else ()


def add_block_products(x: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(x + u, sums of u's blocks) for u_b = P_b x_b.

    Args:
        x: [n, C].
        blocks: P [C/r, r, r], in x's dtype.

    Returns:
        [n, C] and [n, r], or [n, 2 r]: sums of two parts of the blocks, to be added by who uses them.
    """
    if not _by_kernels(x, blocks):
        return add_block_products_torch(x, blocks)
    x, size = x.contiguous(), blocks.shape[1]
    parts = 1 if x.shape[0] > _WANTED * _ROWS else 2
    moved, summed = torch.empty_like(x), x.new_empty(x.shape[0], parts * size)
    if x.shape[0]:
        grid = (-(-x.shape[0] // _ROWS), parts)
        _FORWARD[size](x, grid, 32 * _WARPS[size], x, blocks, moved, summed, *x.shape)
    return moved, summed


def add_block_products_torch(x: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Definition of `add_block_products`."""
    transposed = blocks.transpose(1, 2)
    summed = x @ transposed.reshape(x.shape[1], -1)
    moved = x.clone(memory_format=torch.contiguous_format)
    by_block(moved, blocks).baddbmm_(by_block(x, blocks), transposed)
    return moved, summed


def add_block_products_gradients(grad: Tensor, grad_summed: Tensor, blocks: Tensor) -> Tensor:
    """Turns the gradient of x + u into that of x, in its place, and returns that of u, from both results.

    Args:
        grad: [n, C], contiguous.
        grad_summed: [n, r].
        blocks: see `add_block_products`.

    Returns:
        [n, C]; that of P_b is Σ over n of its block b and x_b.
    """
    if not _by_kernels(grad, blocks):
        return add_block_products_gradients_torch(grad, grad_summed, blocks)
    assert grad.is_contiguous()
    added, size = torch.empty_like(grad), blocks.shape[1]
    if grad.shape[0]:
        tiles = -(-grad.shape[0] // _ROWS)
        grid = (tiles, min(-(-2 * _WANTED // tiles), -(-len(blocks) // _WARPS[size])))
        _BACKWARD[size](grad, grid, 32 * _WARPS[size], grad, grad_summed.contiguous(), blocks, added, *grad.shape)
    return added


def add_block_products_gradients_torch(grad: Tensor, grad_summed: Tensor, blocks: Tensor) -> Tensor:
    """Definition of `add_block_products_gradients`."""
    added = grad + grad_summed.repeat(1, len(blocks))
    by_block(grad, blocks).baddbmm_(by_block(added, blocks), blocks)
    return added


def by_block(x: Tensor, blocks: Tensor) -> Tensor:
    """[n, C] as [C/r, n, r], a view."""
    return x.view(x.shape[0], *blocks.shape[:2]).transpose(0, 1)


def _by_kernels(x: Tensor, blocks: Tensor) -> bool:
    fit = x.is_cuda and x.dtype is torch.bfloat16 and blocks.shape[1] in SIZES and blocks.is_contiguous()
    return fit and _have_kernels(blocks.shape[1])


@functools.cache
def _have_kernels(size: int) -> bool:
    instead = "Plain torch operations are used instead, and Bat takes longer."
    return usable(kernels_for(size), torch.device("cuda"), instead)
