"""Tensors as the element-wise kernels take them: rows of bf16 in vectors of 8, and which threads work on what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HEAD_SIZES = (16, 32, 64, 128)
"""Whose lanes share a warp."""
VECTOR = 8
"""Values in 16 bytes."""
THREADS = 128
"""Of a block."""
SUM_THREADS = 256
"""Of a block that sums over rows."""
_SUM_CHANNELS = 32 * VECTOR
_SUM_BLOCKS_WANTED = 4 * 132


def prepared(tensor: Tensor, name: str) -> Tensor:
    """Contiguous, and named in the message when it does not fit the kernels."""
    if tensor.dtype is torch.bfloat16 and tensor.is_cuda:
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    if not tensor.is_cuda:
        raise RuntimeError(f"{name} is on {tensor.device}, expected a CUDA device")
    raise RuntimeError(f"{name} has dtype {tensor.dtype}, expected bfloat16")


def prepared_parameter(parameter: Tensor, name: str) -> Tensor:
    """A parameter as the kernels read it: it may be stored wider."""
    return prepared(parameter if parameter.dtype is torch.bfloat16 else parameter.to(torch.bfloat16), name)


def read_parameter(parameter: Tensor, name: str) -> Tensor:
    """A parameter as kernels take it that round what is stored in fp32 as they read it."""
    if parameter.dtype is torch.float32 and parameter.is_cuda and parameter.is_contiguous():
        return parameter
    return prepared_parameter(parameter, name)


def check_shape(tensor: Tensor, shape: Sequence[int], name: str) -> None:
    if tensor.shape != shape:
        raise RuntimeError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def check_channels(channels: int, rows: int) -> None:
    if channels % VECTOR:
        raise RuntimeError(f"the channel count is {channels}, expected a multiple of {VECTOR}")
    if rows * (channels // VECTOR) >= 2**32 - 1 or rows >= 2**31 - 1:
        raise RuntimeError(f"{rows} rows of {channels} channels are more than the kernels can index")


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def saved_parameter(ctx: Any, name: str, parameter: Tensor, place: int) -> Tensor | None:
    """Keeps a parameter as it was given, so that no rounded copy lives until the backward.

    A trained one is returned, to go among the saved tensors, which notice changes in place; a frozen one goes beside.
    """
    if ctx.needs_input_grad[place]:
        return parameter
    setattr(ctx, name, parameter)
    return None


def kept_parameter(ctx: Any, name: str, saved: Tensor | None) -> Tensor:
    """What `saved_parameter` kept, as it was given."""
    parameter: Tensor = getattr(ctx, name) if saved is None else saved
    return parameter


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("the fused element-wise operators have no second derivative")


def sum_tile(rows: int, channels: int) -> int:
    """Rows over which one block sums the gradient of a parameter, 32 vectors of it; a kernel adds these up over tiles.

    As many blocks as four on each multiprocessor of an H100 have keep its memory busy; no tile is below 16 rows.
    """
    tiles = -(-_SUM_BLOCKS_WANTED // -(-channels // _SUM_CHANNELS))
    return max(16, -(-rows // tiles))


def sum_grid(rows: int, channels: int, tile: int) -> tuple[int, int]:
    """Blocks of SUM_THREADS threads for tiles of so many rows."""
    return -(-channels // _SUM_CHANNELS), -(-rows // tile)


def blocks_for(rows: int, channels: int, tile: int) -> int:
    """Blocks for one thread per vector and tile of rows."""
    return -(-(-(-rows // tile) * (channels // VECTOR)) // THREADS)
