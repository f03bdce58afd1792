"""Many tensors rounded from fp32 to bf16 at once: on a GPU by one launch for every 32 of them (`cuda/cast.cu`).

Else, and to other dtypes, it is torch's copy of a list, with the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from src.ops.kernels import Kernel, usable

MOST_TOGETHER = 32
"""Tensors of one launch."""
_THREADS = 256
_PIECE = 4096
"""Values of a tensor that a block of threads rounds."""
_MOST_VALUES = 2**31 - _PIECE
_ONE_ROW = 2**31 - 8
"""As the width of what is contiguous."""
TO_BF16 = Kernel("cast.cu", "cast::to_bf16_kernel", f"({'PP' * MOST_TOGETHER}{'iiii' * MOST_TOGETHER})")


def caster(tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> Callable[[], None]:
    """What writes the tensors' values, as they are then, into the outputs at every call; outside autograd.

    Args:
        tensors: of any dtypes.
        outputs: of their shapes, on their device; contiguous, or matrices with contiguous rows.
    """
    if not _by_kernel(tensors, outputs):
        return functools.partial(_copy, list(outputs), list(tensors))
    launches = []
    for first in range(0, len(tensors), MOST_TOGETHER):
        sources, targets = tensors[first : first + MOST_TOGETHER], outputs[first : first + MOST_TOGETHER]
        counts = [source.numel() for source in sources]
        ends = [0]
        for count in counts:
            ends.append(ends[-1] - (-count // _PIECE))
        absent = MOST_TOGETHER - len(counts)
        pointers = (*sources, *absent * [None], *targets, *absent * [None])
        rows = [(_ONE_ROW, 0) if each.is_contiguous() else (each.shape[1], each.stride(0)) for each in targets]
        widths, strides = ([*each, *absent * [0]] for each in zip(*rows, strict=True))
        sizes = (*counts, *absent * [0], *ends[1:], *absent * [ends[-1]], *widths, *strides)
        if ends[-1]:
            launches.append(TO_BF16.prepared(outputs[0], ends[-1], _THREADS, *pointers, *sizes))

    def cast() -> None:
        for launch in launches:
            launch()

    return cast


def _copy(outputs: list[Tensor], tensors: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(outputs, tensors)


def _by_kernel(tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    fit = all(
        source.is_cuda and source.dtype is torch.float32 and source.is_contiguous() and source.numel() < _MOST_VALUES
        for source in tensors
    )
    return fit and all(target.dtype is torch.bfloat16 for target in outputs) and _have_kernel()


@functools.cache
def _have_kernel() -> bool:
    instead = "Plain torch operations are used instead, and adapters take a little longer."
    return usable((TO_BF16,), torch.device("cuda"), instead)
