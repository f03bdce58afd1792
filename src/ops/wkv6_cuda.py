"""The WKV6 operator on NVIDIA GPUs: builds and calls `cuda/wkv6.cu`."""

import functools
import warnings

import torch
from torch import Tensor

from src.errors import KernelError
from src.ops.cuda_extension import load_extension

CUDA_HEAD_SIZE = 64


@functools.cache
def _available_on(index: int) -> bool:
    try:
        with torch.cuda.device(index):
            load_extension("wkv6")
    except KernelError as error:
        warnings.warn(f"{error}. The slower torch form of the operator is used instead.", stacklevel=4)
        return False
    return True


def kernel_is_available(device: torch.device) -> bool:
    """Whether the kernel can be built for this GPU; warns once, with the reason, when it cannot."""
    return _available_on(torch.cuda.current_device() if device.index is None else device.index)


def wkv6_cuda(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    raise KernelError('the CUDA kernel of wkv6 is not there yet; use backend="chunked"')
