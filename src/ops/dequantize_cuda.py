"""Dequantisation of bitsandbytes' packed matrices to bfloat16 on NVIDIA GPUs: `cuda/dequantize.cu`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from src.ops.kernels import Kernel

_THREADS = 256
_VECTOR = 8
_BLOCKS_PER_MULTIPROCESSOR = 8
_ABSMAX_BLOCK = 256
_MOST_VECTORS = 2**31
"""So many the kernels can number."""

KERNELS = {
    (bits, double): Kernel(
        "dequantize.cu", f"dequantize::to_bf16_kernel<{bits}, {'true' if double else 'false'}>", "(PPPPPP i q) P"
    )
    for bits, double in ((4, True), (4, False), (8, False))
}
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
        self._tensors = tuple(tensor for _, tensor, _, _ in expected)
        self._kernel = KERNELS[bits, double]
        self._bits, self._count = bits, count
        full_grid = _multiprocessors(packed.get_device()) * _BLOCKS_PER_MULTIPROCESSOR
        self._blocks = min(-(-count // (_VECTOR * _THREADS)), full_grid)

    def fill(self, dense: Tensor) -> None:
        """Writes the values into `dense`, bf16, contiguous, on the packed data's device, at least `count` of them.

        bf16(code[value] * absmax) with absmax = absmax_code[q] * scale + offset, each operation rounded in fp32, as
        bitsandbytes does.
        """
        if not (dense.dtype is torch.bfloat16 and dense.is_contiguous() and dense.numel() >= self._count):
            raise RuntimeError("the dense matrix must be contiguous bfloat16 on the packed data's device")
        if self._count:
            self._kernel(dense, self._blocks, _THREADS, *self._tensors, self._bits, self._count, dense)


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)
