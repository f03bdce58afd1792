"""The WKV6 operator on NVIDIA GPUs: builds and calls `cuda/wkv6.cu`."""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from src.errors import KernelError
from src.ops.cuda_extension import load_extension

CUDA_HEAD_SIZE = 64


@functools.cache
def _module_for(index: int) -> ModuleType:
    with torch.cuda.device(index):
        return load_extension("wkv6")


@functools.cache
def _is_available_on(index: int) -> bool:
    try:
        _module_for(index)
    except KernelError as error:
        warnings.warn(f"{error}. The slower torch form of the operator is used instead.", stacklevel=5)
        return False
    return True


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def kernel_is_available(device: torch.device) -> bool:
    """Whether the kernel can be built for this GPU; warns once, with the reason, when it cannot."""
    return _is_available_on(_index_of(device))


def wkv6_cuda(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_raw: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    span_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Runs the CUDA kernel; arguments and results as `src.ops.wkv6.wkv6`, in bfloat16 at head size 64.

    Numerics: running state, its gradient and all sums in float32; operands of matrix products rounded to
    bfloat16. Saved for the backward: the inputs, the state every 64 tokens in bfloat16 and the weights of token
    pairs inside tiles of 16 (together 1.25 times y); nothing when no gradient is wanted, and only r and w_raw when
    the state's alone is. Results are the same bits in every run.

    Args:
        span_tokens: long sequences are cut into spans of this many tokens (a multiple of 64) that run at
            the same time; 0 chooses from the size of the GPU.

    Raises:
        KernelError: the kernel cannot be built.
        RuntimeError: a tensor does not fit (named), or the launch failed.
    """
    y, final = _module_for(_index_of(r.device)).wkv6(r, k, v, w_raw, _bonus(u), state, cu_seqlens, span_tokens)
    return y, final


def wkv6_branching_cuda(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_raw: Tensor,
    u: Tensor,
    state: Tensor,
    root_borders: Tensor,
    child_borders: Tensor,
    parents: Tensor,
    root_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel for roots and children in turn; arguments and results as `src.ops.wkv6.wkv6_branching`.

    Numerics, and what is saved, as `wkv6_cuda`; results are the same bits in every run for at most two children of a
    root. Unlike two calls of it this copies no tokens and no states.

    Raises:
        KernelError: the kernel cannot be built.
        RuntimeError: a tensor does not fit (named), or the launch failed.
    """
    y, final = _module_for(_index_of(r.device)).wkv6_branching(
        r, k, v, w_raw, _bonus(u), state, root_borders, child_borders, parents, root_tokens
    )
    return y, final


def _bonus(u: Tensor) -> Tensor:
    return u if u.dtype in (torch.float32, torch.bfloat16) else u.float()
