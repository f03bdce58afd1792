"""Steps issued as for a GPU where there is none: everything above the driver is the program's, kernels do not run.

Tensors lie on the CPU and are said to be on a GPU; what a kernel would have written is whatever memory holds.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from kernel_families import FAMILIES
from torch import Tensor

from src.model import language_model
from src.ops import elementwise, elementwise_cuda, kernels, wkv6_cuda
from src.ops.kernels import Kernel
from src.ops.nvrtc import Compiled

_NO_GPU = -1
"""What tensors of the CPU give as their GPU's number."""


def widened(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product that takes `out_dtype`, as those for GPUs do."""

    def multiply(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Tensor) -> Tensor:
        return product(a, b, **options) if out_dtype is None else product(a.to(out_dtype), b.to(out_dtype), **options)

    return multiply


class Driver:
    """Takes launches and forgets them.

    Attributes:
        cuLaunchKernel: a function of C that reads none of its arguments and returns 0, called as the driver's is.
    """

    def __init__(self) -> None:
        self.cuLaunchKernel: Callable[..., int] = ctypes.PyDLL(None).PyErr_CheckSignals

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *arguments: 0


@contextmanager
def issued(launch: Callable[..., int] | None = None) -> Iterator[None]:
    """Inside, kernels are launched on a driver that does nothing, or that calls `launch`."""
    driver = Driver()
    if launch is not None:
        driver.cuLaunchKernel = launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        for name in ("mm", "bmm"):
            patch.setattr(torch, name, widened(getattr(torch, name)))
        patch.setattr(torch._C, "_cuda_getDevice", _NO_GPU.__int__, raising=False)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", abs, raising=False)
        patch.setattr(kernels, "_driver", lambda: driver)
        patch.setattr(kernels, "_check_layout", lambda *arguments: None)
        patch.setattr(kernels, "_usable", functools.cache(lambda *arguments: True))
        patch.setattr(kernels, "_index_of", lambda device: device.index)
        patch.setattr(Kernel, "compile", lambda *arguments: SimpleNamespace(result=lambda: Compiled("kernel", b"")))
        card = SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=227 * 1024)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        for module in (elementwise, language_model):
            patch.setattr(module, "fused_kernels", functools.cache(lambda: elementwise_cuda))
        # So short a span that 72 tokens of one head are split between blocks, as 1024 tokens of 7B are.
        patch.setattr(wkv6_cuda, "_SHORTEST_SPAN", 64)
        yield
    forget_launches()


def forget_launches() -> None:
    """Kernels have been loaded nowhere."""
    for kernel in itertools.chain(*FAMILIES.values()):
        kernel._loaded.pop(_NO_GPU, None)
