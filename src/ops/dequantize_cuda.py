"""Dequantisation of bitsandbytes' packed matrices to bfloat16 on NVIDIA GPUs: `cuda/dequantize.cu`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from src.ops.kernels import Kernel

_THREADS = 256
_VECTOR = 8
_BLOCKS_PER_MULTIPROCESSOR = 8
_ABSMAX_BLOCK = 256
_MOST_VECTORS = 2**31
"""So many the kernels can number."""

MOST_TOGETHER = 5
"""Matrices of one launch."""

_PACKED = "(PPPPPP i q)"
KERNELS, OF_SEVERAL = (
    {
        (bits, double): Kernel(
            "dequantize.cu", f"dequantize::{name}<{bits}, {'true' if double else 'false'}>", parameters
        )
        for bits, double in ((4, True), (4, False), (8, False))
    }
    for name, parameters in (
        ("to_bf16_kernel", f"{_PACKED} P"),
        ("several_to_bf16_kernel", f"({_PACKED * MOST_TOGETHER} {'P' * MOST_TOGETHER})"),
    )
)
"""By bits of a value, and whether the scales of blocks are quantised themselves."""


class PackedMatrix:
    """A matrix as bitsandbytes packs it, checked, and ready to be dequantised again and again.

    Args:
        packed: uint8, 16-byte aligned: 4-bit types two values a byte, the first in the high nibble, in blocks of 64
            values; 8-bit one a byte, in blocks of 256.
        absmax: one per block: uint8 where `absmax_scale` is given, else fp32.
        absmax_scale: fp32, one per 256 absmax; None without double quantisation, as always with 8 bits.
        absmax_offset: fp32, one; None exactly when absmax_scale is.
        absmax_code: fp32 [256].
        value_code: fp32, 16 values (4 bits) or 256 (8 bits).
        bits: 4 or 8.
        count: values, a multiple of 8.

    Raises:
        RuntimeError: a tensor does not fit; the message names it.
    """

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        absmax_code: Tensor,
        value_code: Tensor,
        bits: int,
        count: int,
    ) -> None:
        _require(packed.is_cuda, f"packed is on {packed.device}, expected a CUDA device")
        _require(bits in (4, 8), f"values have {bits} bits, expected 4 or 8")
        _require(count % _VECTOR == 0, f"the matrix has {count} values, expected a multiple of {_VECTOR}")
        _require(count // _VECTOR < _MOST_VECTORS, f"the matrix has {count} values, more than the kernel can number")
        _require(packed.data_ptr() % 16 == 0, "packed must be 16-byte aligned")
        _require((absmax_scale is None) == (absmax_offset is None), "absmax_scale and absmax_offset go together")
        double = absmax_scale is not None
        _require(bits == 4 or not double, "8-bit matrices have no double quantisation")
        blocks = -(-count // (64 if bits == 4 else 256))
        expected: list[tuple[str, Tensor | None, torch.dtype, int]] = [
            ("packed", packed, torch.uint8, count * bits // 8),
            ("absmax", absmax, torch.uint8 if double else torch.float32, blocks),
            ("absmax_scale", absmax_scale, torch.float32, -(-blocks // _ABSMAX_BLOCK)),
            ("absmax_offset", absmax_offset, torch.float32, 1),
            ("absmax_code", absmax_code, torch.float32, 256),
            ("value_code", value_code, torch.float32, 16 if bits == 4 else 256),
        ]
        for name, tensor, dtype, numel in expected:
            if tensor is not None:
                _require(tensor.dtype is dtype, f"{name} has dtype {tensor.dtype}, expected {dtype}")
                on_device = tensor.is_contiguous() and tensor.device == packed.device
                _require(on_device, f"{name} must be contiguous and on the device of packed")
                _require(tensor.numel() == numel, f"{name} has {tensor.numel()} elements, expected {numel}")
        self._values = (*(tensor for _, tensor, _, _ in expected), bits, count)
        self._kind = bits, double
        self._count = count
        full_grid = _multiprocessors(packed.get_device()) * _BLOCKS_PER_MULTIPROCESSOR
        self._blocks = min(-(-count // (_VECTOR * _THREADS)), full_grid)

    def fill(self, dense: Tensor) -> None:
        """Writes the values into `dense`, bf16, contiguous, on the packed data's device, at least `count` of them.

        bf16(code[value] * absmax) with absmax = absmax_code[q] * scale + offset, each operation rounded in fp32, as
        bitsandbytes does.
        """
        self._check(dense)
        if self._count:
            KERNELS[self._kind](dense, self._blocks, _THREADS, *self._values, dense)

    def filler(self, dense: Tensor) -> Callable[[], None]:
        """What writes the values into `dense` at every call, as `fill` does."""
        return filler([self], [dense])

    def _check(self, dense: Tensor) -> None:
        if not (dense.dtype is torch.bfloat16 and dense.is_contiguous() and dense.numel() >= self._count):
            raise RuntimeError("the dense matrix must be contiguous bfloat16 on the packed data's device")


def filler(matrices: Sequence[PackedMatrix], dense: Sequence[Tensor]) -> Callable[[], None]:
    """What writes the values of matrices into one dense tensor each at every call, by one launch.

    Args:
        matrices: of one kind, 1 to `MOST_TOGETHER`.
        dense: as for `PackedMatrix.fill`.
    """
    assert len({matrix._kind for matrix in matrices}) == 1
    assert len(matrices) <= MOST_TOGETHER
    for matrix, values in zip(matrices, dense, strict=True):
        matrix._check(values)
    first = matrices[0]
    blocks = max(matrix._blocks for matrix in matrices)
    if not blocks:
        return lambda: None
    if len(matrices) == 1:
        return KERNELS[first._kind].prepared(dense[0], blocks, _THREADS, *first._values, dense[0])
    absent = MOST_TOGETHER - len(matrices)
    described = [value for matrix in matrices for value in matrix._values] + absent * [*6 * [None], 0, 0]
    grid = (blocks, len(matrices))
    return OF_SEVERAL[first._kind].prepared(dense[0], grid, _THREADS, *described, *dense, *absent * [None])


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)
