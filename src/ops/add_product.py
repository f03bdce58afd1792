"""y += h u with a narrow h, in place: on a GPU in bf16 one kernel that passes over y once (`cuda/add_product.cu`)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from src.ops.kernels import Kernel, usable

_GROUPS = {16: 2, 32: 2, 64: 2, 128: 1}
"""By rank: how many times 32 columns a block of threads has."""
_ROWS = 64
_MOST_PARTS = 4
"""Of so many rows, that a block has."""
_WANTED = 4 * 132
"""Blocks that fill a GPU."""
KERNELS = {
    (rank, by_columns): Kernel(
        "add_product.cu",
        f"add_product::kernel<{rank}, {groups}, {'true' if by_columns else 'false'}>",
        "PPP (qqq) iii",
    )
    for rank, groups in _GROUPS.items()
    for by_columns in (False, True)
}
"""By rank, and whether u lies by columns."""


def kernels_for(rank: int) -> tuple[Kernel, ...]:
    """The kernels that a rank needs; none if it has none."""
    return (KERNELS[rank, False], KERNELS[rank, True]) if rank in _GROUPS else ()


def add_narrow_product(y: Tensor, h: Tensor, u: Tensor) -> bool:
    """Adds h u to y, with sums in fp32 that are rounded once; False, and nothing, where there is no kernel for them.

    Args:
        y: [rows, columns], or a batch of them, as the others.
        h: [rows, rank].
        u: [rank, columns], by rows or by columns.
    """
    rank, columns = u.shape[-2:]
    by_columns = u.stride(-2) == 1 and u.stride(-1) == rank
    if not (y.is_cuda and rank in _GROUPS and columns % 8 == 0):
        return False
    if not (by_columns or (u.stride(-1) == 1 and u.stride(-2) == columns)):
        return False
    if not (_by_rows(y, columns) and _by_rows(h, rank)) or y.dtype is not h.dtype or y.dtype is not u.dtype:
        return False
    batch, strides = (y.shape[0], (y.stride(0), h.stride(0), u.stride(0))) if y.ndim == 3 else (1, (0, 0, 0))
    unaligned = (strides[0] | strides[1] | strides[2]) % 8 or (y.data_ptr() | h.data_ptr() | u.data_ptr()) % 16
    if unaligned or not _have(rank):
        return False
    if y.numel():
        rows, groups = y.shape[-2], -(-columns // (32 * _GROUPS[rank]))
        parts = -(-rows // _ROWS)
        of_block = min(-(-parts * groups * batch // _WANTED), _MOST_PARTS)
        grid = (groups, -(-parts // of_block), batch)
        KERNELS[rank, by_columns](y, grid, 128, y, h, u, *strides, rows, columns, of_block * _ROWS)
    return True


def _by_rows(x: Tensor, columns: int) -> bool:
    return x.dtype is torch.bfloat16 and x.stride(-1) == 1 and x.stride(-2) == columns


@functools.cache
def _have(rank: int) -> bool:
    instead = "Plain torch operations are used instead, and adapters take a little longer."
    return usable(kernels_for(rank), torch.device("cuda"), instead)
